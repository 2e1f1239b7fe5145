"""What teachers say of given text: asked now (`asked`, `said`), or once and kept on the disk (`store`, `states`).

In come a pair and texts with their completions; out goes what each teacher says at every token of them, exactly or as its
likeliest tokens. Whatever a teacher does once lies in a `Store`: in parts that are whole or absent, and bound to what made them.
"""
