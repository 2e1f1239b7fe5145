"""Rows of data files on their way to token ids.

In come files, or names of data sets, with the template that text is written under; out go texts as token ids (`Text`), in
order, and batches of them. Here is decided which rows are usable, and why another is not.
"""
