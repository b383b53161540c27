"""Machine profiles: what bounds the speed on a machine, described, shipped and measured."""
