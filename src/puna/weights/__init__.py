"""weights read and write the numbers: every checkpoint format behind one interface, and the ways to get one."""
