"""What a computer is: its limits, cores and bandwidths; profiles of machines, shipped and measured."""
