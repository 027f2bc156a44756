"""What a response says, before anybody judges it.

mathematics.py   its answer, and both sides of a comparison written alike
programs.py      the program that it stands by
"""
