"""What is measured of serving, a file each."""
