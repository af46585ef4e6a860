"""The other engines of `puna bench --against`, each a program that runs in a process of its own.

What is surprising: nothing in Puna imports these, and they import nothing of Puna but the protocol (standard library
alone), so that the interpreter that runs them may be another one, with the peers installed and Puna not.
"""
