// Package fleet runs a CA and many agents in one process and in fake time: a month of a fleet's life in seconds.
package fleet
