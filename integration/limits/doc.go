// Package limits attacks the ports of the CA and of the agent over real sockets, with frames that no client sends, and
// measures what a flood costs the neighbours of whoever makes it.
package limits
