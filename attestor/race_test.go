//go:build race

package attestor_test

// raceEnabled: the race detector empties pools at random, so allocations cannot be measured.
const raceEnabled = true
