"""Speed and memory, measured side by side: ``python -m benchmarks.decode``, ``.step``, ``.memory``, ``.scaling`` and others.

``.counts`` counts what holds on any machine, ``.roofline`` calculates what a GPU would take.
"""
