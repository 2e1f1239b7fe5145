"""What a method is made of: policies (who writes a token), objectives (what is lowered at it), mixes (which text a step reads).

In come log-probabilities of teacher (p) and student (q), and settings; out go decisions, losses, divergences and keyed
noise. All of it is pure: no model, no file, no clock.
"""
