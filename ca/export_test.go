package ca

// SetBundle replaces the trust bundle, as a rotation step does.
func (ca *CA) SetBundle(b *Bundle) { ca.bundle.Set(b) }
