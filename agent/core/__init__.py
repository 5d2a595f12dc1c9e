"""The pure part: records, model, resolution and plans. No I/O, no clock, no logging."""
