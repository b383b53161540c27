"""The native library: found, opened, its functions declared. Beside it llama.cpp's log and OpenMP's threads."""
