"""What model is this: asked once, in front of every family, of a folder or of a single file.

Class names, markers and headers are looked at here, so that what contradicts an assumption is
corrected and said, or refused by name: `folders` and `markers` give an `identity.Identity`.
"""
