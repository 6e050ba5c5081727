"""The anchor-bias suite: does the speech decide what is answered, or the instruction?"""
