// Package pods tests the sockets of pods with the real programs: a CA, an agent, and a test in the place of kubelet, which
// knows no more of the agent than kubelet does.
package pods
