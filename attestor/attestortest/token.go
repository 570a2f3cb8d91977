package attestortest

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-ca/signet/internal/canary"
)

// Pod is a pod that a token is bound to, on its node.
type Pod struct {
	Namespace         string
	Name              string
	UID               string
	ServiceAccount    string
	ServiceAccountUID string
	NodeName          string
	NodeUID           string
}

// NewPod returns a pod with the UIDs that a cluster would give: a new one for the pod, the same ones each time for the
// ServiceAccount and the node of these names.
func NewPod(namespace, name, serviceAccount, node string) Pod {
	var uid [16]byte
	rand.Read(uid[:])
	return Pod{
		Namespace: namespace, Name: name, UID: uuid(uid),
		ServiceAccount: serviceAccount, ServiceAccountUID: namedUID("sa", namespace, serviceAccount),
		NodeName: node, NodeUID: namedUID("node", node),
	}
}

// Draft is a token that is not signed yet. A test changes it to say what no API server would.
type Draft struct {
	Header map[string]any // alg, kid
	Claims map[string]any // aud, canary, exp, iat, iss, jti, kubernetes.io, nbf, sub

	RawHeader []byte // replaces the JSON of Header unless nil
	RawClaims []byte // replaces the JSON of Claims unless nil

	Sign func(input []byte) ([]byte, error) // signs "header.claims"; the issuer's newest key unless replaced
}

// Kubernetes returns the "kubernetes.io" claim, for changes in place.
func (d *Draft) Kubernetes() map[string]any {
	m, _ := d.Claims["kubernetes.io"].(map[string]any)
	return m
}

// Compact encodes and signs the draft (RFC 7515 section 3.1).
func (d *Draft) Compact() (string, error) {
	header, claims := d.RawHeader, d.RawClaims
	var err error
	if header == nil {
		if header, err = json.Marshal(d.Header); err != nil {
			return "", err
		}
	}
	if claims == nil {
		if claims, err = json.Marshal(d.Claims); err != nil {
			return "", err
		}
	}
	input := b64(header) + "." + b64(claims)
	sig, err := d.Sign([]byte(input))
	if err != nil {
		return "", err
	}
	return input + "." + b64(sig), nil
}

// Draft returns the token that Token would sign.
func (i *Issuer) Draft(p Pod, audience string, ttl time.Duration) *Draft {
	k := i.current()
	now := time.Now()
	var id [16]byte
	rand.Read(id[:])
	return &Draft{
		Header: map[string]any{"alg": k.alg, "kid": k.kid},
		Claims: map[string]any{
			"aud":    []any{audience},
			"canary": canary.Marker, // no API server's: a token that is shown somewhere is seen there
			"exp":    now.Add(ttl).Unix(),
			"iat":    now.Unix(),
			"iss":    i.name,
			"jti":    uuid(id),
			"kubernetes.io": map[string]any{
				"namespace":      p.Namespace,
				"node":           ref(p.NodeName, p.NodeUID),
				"pod":            ref(p.Name, p.UID),
				"serviceaccount": ref(p.ServiceAccount, p.ServiceAccountUID),
			},
			"nbf": now.Unix(),
			"sub": "system:serviceaccount:" + p.Namespace + ":" + p.ServiceAccount,
		},
		Sign: k.sign,
	}
}

// Token signs a token that is bound to p, for one audience, from now for ttl. Each change is applied to the draft first.
func (i *Issuer) Token(p Pod, audience string, ttl time.Duration, change ...func(*Draft)) (string, error) {
	d := i.Draft(p, audience, ttl)
	for _, c := range change {
		c(d)
	}
	return d.Compact()
}

// WriteToken writes a token as kubelet does: the whole file at once, without a newline at its end.
func (i *Issuer) WriteToken(path string, p Pod, audience string, ttl time.Duration, change ...func(*Draft)) error {
	token, err := i.Token(p, audience, ttl, change...)
	if err != nil {
		return err
	}
	return writeFile(path, []byte(token))
}

// Directory is the CA's file directory with these pods in it, of that issuer: JSON.
func Directory(issuer string, pods iter.Seq[Pod]) ([]byte, error) {
	type pod struct {
		Issuer            string `json:"issuer"`
		Namespace         string `json:"namespace"`
		Name              string `json:"name"`
		UID               string `json:"uid"`
		ServiceAccount    string `json:"serviceAccount"`
		ServiceAccountUID string `json:"serviceAccountUID"`
		Node              string `json:"node"`
		NodeUID           string `json:"nodeUID"`
	}
	var doc struct {
		Pods []pod `json:"pods"`
	}
	for p := range pods {
		doc.Pods = append(doc.Pods, pod{issuer, p.Namespace, p.Name, p.UID, p.ServiceAccount, p.ServiceAccountUID, p.NodeName, p.NodeUID})
	}
	return json.MarshalIndent(doc, "", "  ")
}

// Audiences is a change that makes the token one for exactly these audiences.
func Audiences(audiences ...string) func(*Draft) {
	list := make([]any, len(audiences))
	for n, a := range audiences {
		list[n] = a
	}
	return func(d *Draft) { d.Claims["aud"] = list }
}

// Claim is a change that sets one top-level claim.
func Claim(name string, value any) func(*Draft) { return func(d *Draft) { d.Claims[name] = value } }

// Without is a change that leaves top-level claims out.
func Without(names ...string) func(*Draft) {
	return func(d *Draft) {
		for _, n := range names {
			delete(d.Claims, n)
		}
	}
}

// Header is a change that sets one header member.
func Header(name string, value any) func(*Draft) { return func(d *Draft) { d.Header[name] = value } }

// Unbound is a change that makes the token one that is bound to nothing, as people get it from a TokenRequest.
func Unbound(d *Draft) {
	delete(d.Kubernetes(), "pod")
	delete(d.Kubernetes(), "node")
}

func ref(name, uid string) map[string]any { return map[string]any{"name": name, "uid": uid} }

func uuid(b [16]byte) string {
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // RFC 9562 section 5.4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func namedUID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "/")))
	return uuid([16]byte(sum[:16]))
}

// writeFile replaces path in one step, so that a reader sees the old contents or the new and nothing else.
func writeFile(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
