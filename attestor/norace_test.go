//go:build !race

package attestor_test

const raceEnabled = false
