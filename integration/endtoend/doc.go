// Package endtoend runs the real binaries as processes, with real Envoys where there is one, and looks at them only from
// outside.
package endtoend
