"""What a conversion costs in quality."""
