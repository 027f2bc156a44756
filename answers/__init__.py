"""What a response says, before anybody judges it.

mathematics.py   its answer to a problem of mathematics
writing.py       one writing for such answers, before they are compared
programs.py      the program that it stands by
"""
