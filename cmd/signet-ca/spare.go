package main

// spareBytes is how much more than twice what lives the heap may hold before it is collected.
const spareBytes = 32 << 20

// spare returns memory that is never touched, so it costs addresses and no memory. The collector takes it for alive and waits
// until as much again was allocated: a CA holds a few MiB, and would be collected hundreds of times a second while it issues.
// A larger GOGC would do the same for a small heap, and multiply a large one.
func spare() []byte { return make([]byte, spareBytes) }
