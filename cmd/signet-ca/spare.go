package main

import "runtime/debug"

// spareBytes is how much more than twice what lives the heap may hold before it is collected.
const spareBytes = 32 << 20

// spare returns memory that is never touched, so that by itself it costs addresses only. The collector takes it for alive and
// waits until as much again was allocated: a CA holds a few MiB, and would be collected hundreds of times a second while it
// issues. So up to spareBytes of garbage are resident under load; a larger GOGC would do the same for a small heap, and
// multiply a large one. It counts towards GOMEMLIMIT, so it is a sixteenth of that at most, and stands in a heap profile under
// this function's name.
func spare() []byte { return make([]byte, min(spareBytes, debug.SetMemoryLimit(-1)/16)) }
