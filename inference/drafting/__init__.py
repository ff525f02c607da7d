"""Guessing the next tokens of a session, and deciding how many guesses pay.

``port`` says what a drafter is; ``suffix`` guesses from text that has been seen before, ``model``
asks a smaller model, ``combined`` takes the better of both.  ``controller`` decides how many
guesses a step carries and how many steps are in flight, from what passes were measured to take
(``costs``) and from how often guesses were right (``calibration``).

A guess never changes an answer: the tail samples every token itself, and keeps those guesses that
it would have sampled.
"""
