# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What one does with the method: the command line, a sheet to look at, measuring, publishing. Nothing imports it but
benchmarks and tests."""
