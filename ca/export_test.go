package ca

import "crypto/tls"

// SetBundle replaces the trust bundle, as a rotation step does.
func (ca *CA) SetBundle(b *Bundle) { ca.bundle.Set(b) }

// Self returns the replica's own identity with its key, which never leaves the process but in a test.
func (ca *CA) Self() *tls.Certificate { return ca.signing.Load().self }
