"""Text that two models write together, token by token, under a policy.

In come a pair, prompts, a policy and `DecodeSettings`; out go `Rollouts`: token ids, speakers, divergences, thresholds and
the cost. `decode_reference` says what is right, and the engine gives the same sooner.
"""
