// Package faults kills the CA, and fails it, at every system call that touches its files, and judges from outside what is
// left: each certificate that a client holds is on record, nothing is torn, and the state is the one before or the one
// after.
//
// A process under test runs under a warden: a seccomp filter hands each of its calls on files to this process, which
// counts them over all threads in one order and lets the one that is due go through, fail, do half, do all and fail, or be
// the last. So a point is hit exactly once and the same one each time, on the real binary too. Disks that are really full
// or really gone are mounted where that is allowed.
package faults
