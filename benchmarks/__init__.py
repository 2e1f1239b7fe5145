"""Speed and memory, measured side by side: ``python -m benchmarks.decode``, ``.step``, ``.memory``, ``.scaling``."""
