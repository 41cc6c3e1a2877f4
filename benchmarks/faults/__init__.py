"""A campaign of faults: runs are killed, their files damaged, their disks filled, and what they leave is checked."""
