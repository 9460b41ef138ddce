"""How many weights where: densities (`allocate`), measured losses, and plans by latency."""
