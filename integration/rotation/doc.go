// Package rotation tests rotations of the root with the real programs: one CA, agents of several nodes on this machine, peers
// that make a new TLS connection all the time, and the operator's tool. What is slow, refuses or is killed here is a process.
package rotation
