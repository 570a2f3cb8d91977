package journal

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"time"
)

// validateRotation checks what came with schema 3.
func (j Journal) validateRotation() error {
	if j.Schema < 3 && (j.Operation != nil || len(j.Past)+len(j.Excuses)+len(j.Gone) > 0 || !j.Changed.IsZero()) {
		return corrupt("schema %d with rotations", j.Schema)
	}
	if len(j.Past) > MaxPast || len(j.Excuses) > MaxExcuses || len(j.Gone) > 2*MaxGone {
		return corrupt("%d past operations, %d excuses, %d authorities that are gone", len(j.Past), len(j.Excuses), len(j.Gone))
	}
	for i, g := range j.Gone {
		if err := g.validate(); err != nil {
			return err
		}
		if j.find(g.ID) >= 0 || slices.ContainsFunc(j.Gone[:i], func(o Gone) bool { return o.ID == g.ID }) {
			return corrupt("authority %s, which is gone, is there twice", g.ID)
		}
	}
	for i, e := range j.Excuses {
		if err := e.validate(); err != nil {
			return err
		}
		if i > 0 && compareExcuses(j.Excuses[i-1], e) >= 0 {
			return corrupt("the excuse of %.64q is out of order", e.Name)
		}
	}
	for i, p := range j.Past {
		if err := p.validate(); err != nil {
			return err
		}
		if slices.ContainsFunc(j.Past[:i], func(o Past) bool { return o.ID == p.ID }) {
			return corrupt("operation %s ended twice", p.ID)
		}
	}
	for _, a := range j.Authorities {
		if err := j.validateSince3(a); err != nil {
			return err
		}
	}
	return j.validateOperation()
}

// validateSince3 checks of an authority what came with schema 3.
func (j Journal) validateSince3(a Authority) error {
	if j.Schema < 3 && (a.Upstream != "" || a.CrossBy != "" || a.Since != 0 || len(a.Cross) > 0 || a.Times != (Times{})) {
		return corrupt("schema %d with the times of authority %s", j.Schema, a.ID)
	}
	if !goodText(a.Upstream, maxName) {
		return corrupt("the upstream of authority %s", a.ID)
	}
	if (a.CrossBy == "") != (len(a.Cross) == 0) {
		return corrupt("the cross-signed certificate of authority %s", a.ID)
	}
	if len(a.Cross) == 0 {
		return nil
	}
	// One by a compromised root would lead everybody who still holds that root to what its thief made.
	if i := j.find(a.CrossBy); i >= 0 && j.Authorities[i].State == Tainted {
		return corrupt("authority %s is cross-signed by %s, which is compromised", a.ID, a.CrossBy)
	}
	if i := j.findGone(a.CrossBy); i >= 0 && j.Gone[i].Tainted {
		return corrupt("authority %s is cross-signed by %s, which was compromised", a.ID, a.CrossBy)
	}
	own, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return corrupt("authority %s: %v", a.ID, err)
	}
	if err := checkCross(own, a.Cross, a.CrossBy); err != "" {
		return corrupt("the cross-signed certificate of authority %s %s", a.ID, err)
	}
	return nil
}

// checkCross says what is wrong with a cross-signed certificate of a root; empty where nothing is. Its signature is checked
// when it comes into the record.
func checkCross(own *x509.Certificate, cross []byte, by string) string {
	c, err := x509.ParseCertificate(cross)
	switch {
	case err != nil:
		return "does not parse"
	case !c.IsCA || !c.BasicConstraintsValid:
		return "is not that of a CA"
	case !bytes.Equal(c.RawSubjectPublicKeyInfo, own.RawSubjectPublicKeyInfo):
		return "has another key"
	case !bytes.Equal(c.RawSubject, own.RawSubject):
		return "has another subject"
	case !bytes.Equal(c.SubjectKeyId, own.SubjectKeyId):
		return "has another key id"
	case hex.EncodeToString(c.AuthorityKeyId) != by:
		return "is signed by another authority than it says"
	}
	return ""
}

// validateOperation checks the rotation under way against the authorities that it is about.
func (j Journal) validateOperation() error {
	o := j.Operation
	if o == nil {
		return nil
	}
	if !opID.MatchString(o.ID) || !goodKind(o.Kind) || !goodBy(o.By, o.Why) || o.Begun.IsZero() || !o.good() || len(o.Forced) > maxForced {
		return corrupt("operation %.64q", o.ID)
	}
	if slices.ContainsFunc(j.Past, func(p Past) bool { return p.ID == o.ID }) {
		return corrupt("operation %s is under way and has ended", o.ID)
	}
	i := j.find(o.Authority)
	if i < 0 || j.Authorities[i].State == Removed || j.Authorities[i].State == Tainted {
		return corrupt("operation %s is about authority %.64q", o.ID, o.Authority)
	}
	if back := j.Authorities[i].State == Retiring; back != (o.Back != nil) {
		return corrupt("operation %s leads to authority %s, which is %s", o.ID, o.Authority, j.Authorities[i].State)
	}
	if (o.Kind == Emergency) != (len(o.Compromised) > 0) || len(o.Compromised) > MaxAuthorities || o.Kind == Emergency && o.Back != nil {
		return corrupt("operation %s about %d compromised authorities", o.ID, len(o.Compromised))
	}
	if slices.Contains(o.Compromised, o.Authority) {
		return corrupt("operation %s leads to a compromised authority", o.ID)
	}
	if o.Back != nil && (!goodBy(o.Back.By, o.Back.Why) || o.Back.At.IsZero()) {
		return corrupt("operation %s was rolled back by nobody", o.ID)
	}
	for _, f := range o.Forced {
		if !goodBy(f.By, "") || f.At.IsZero() || f.Count < 1 {
			return corrupt("operation %s was forced by nobody", o.ID)
		}
	}
	return nil
}

func goodKind(k Kind) bool { return k == Planned || k == Switch || k == Emergency }

func goodBy(by, why string) bool {
	return by != "" && goodText(by, MaxRotateText) && goodText(why, MaxRotateText)
}

func (g Gone) validate() error {
	if !goodHex(g.ID, 0) || !goodHex(g.Hash, sha256.Size) || !goodHex(g.Key, sha256.Size) || g.At.IsZero() || g.NotAfter.IsZero() {
		return corrupt("authority %.64q, which is gone", g.ID)
	}
	return nil
}

// goodHex reports whether text is lower-case hex of that many bytes; of 1 to 64 where size is 0.
func goodHex(text string, size int) bool {
	b, err := hex.DecodeString(text)
	return err == nil && hex.EncodeToString(b) == text && (size == len(b) || size == 0 && len(b) >= 1 && len(b) <= 64)
}

func (p Past) validate() error {
	if !opID.MatchString(p.ID) || !goodKind(p.Kind) || !goodBy(p.By, p.Why) || p.Begun.IsZero() || p.Ended.IsZero() ||
		!slices.Contains([]Outcome{Done, Aborted, RolledBack, Superseded}, p.Outcome) || !goodHex(p.Authority, 0) || !goodHex(p.Replaces, 0) ||
		p.EndedBy != (Word{}) && (!goodBy(p.EndedBy.By, p.EndedBy.Why) || p.EndedBy.At.IsZero()) {
		return corrupt("past operation %.64q", p.ID)
	}
	return nil
}

// validate checks one excuse: it is named, reasoned and expires.
func (e Excuse) validate() error {
	if !slices.Contains([]Scope{ScopeNode, ScopeNamespace, ScopePod}, e.Scope) || e.Name == "" || e.Reason == "" || !goodBy(e.By, e.Reason) ||
		!goodText(e.Name, 2*maxName+1) || !goodText(e.Cluster, maxCluster) || e.At.IsZero() || !e.Until.After(e.At) {
		return corrupt("excuse of %.64q", e.Name)
	}
	return nil
}

// covers reports whether the excuse speaks of whom b names, at that time.
func (e Excuse) covers(b Blocker, now time.Time) bool {
	if !now.Before(e.Until) || e.Cluster != "" && e.Cluster != b.Cluster {
		return false
	}
	switch e.Scope {
	case ScopeNode:
		return e.Name == b.Node || e.Name == b.NodeUID
	case ScopeNamespace:
		return e.Name == b.Namespace
	case ScopePod:
		return e.Name == b.PodUID || b.Namespace != "" && e.Name == b.Namespace+"/"+b.Pod
	}
	return false
}
