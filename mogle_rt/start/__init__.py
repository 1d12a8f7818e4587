"""How a program starts: it imports what it needs of the large libraries, and no more."""
