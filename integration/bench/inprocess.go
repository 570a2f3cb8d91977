//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/audit"
)

// writers is how many requests are in work at once in process, as with 64 clients: so many share a sync of the ledger.
const writers = 64

// issuer is an SVID's way through the CA's parts without a network: token, policy, CSR, leaf, ledger, signature, its check.
type issuer struct {
	attestor *attestor.ServiceAccount
	policy   *ca.Policy
	signer   *issuance.Issuer
	key      *ecdsa.PrivateKey // of signer, for what is signed and not checked
	ledger   *audit.Log
	asks     []asked
}

type asked struct {
	evidence attestor.Evidence
	csr      []byte
}

func (i *issuer) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "make":
		return with(arg, func(dir string) (any, error) { return nil, i.make(dir) })
	case "issue":
		return with(arg, func(r inProcess) (any, error) { return i.run(ctx, r) })
	default:
		return nil, errUnknown
	}
}

// Close closes the ledger.
func (i *issuer) Close() error {
	if i.ledger == nil {
		return nil
	}
	return i.ledger.Close()
}

func (i *issuer) make(dir string) error {
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	kube, err := attestortest.NewIssuer(attestortest.Config{Issuer: issuerName, Algorithm: "RS256"})
	if err != nil {
		return err
	}
	for n := range writers {
		pod := attestortest.NewPod("shop", fmt.Sprintf("web-%d", n), fmt.Sprintf("web-%d", n), nodeName(0))
		token, err := kube.Token(pod, "signet:"+trustDomain, 12*time.Hour)
		if err != nil {
			return err
		}
		csr, _, err := newCSR()
		if err != nil {
			return err
		}
		i.asks = append(i.asks, asked{attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}, csr})
	}
	keys, err := attestor.StaticKeys(kube.JWKS())
	if err != nil {
		return err
	}
	if i.attestor, err = attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{issuerName: keys}}); err != nil {
		return err
	}
	if i.policy, err = ca.NewPolicy(ca.PolicyFile{Namespaces: []string{"*"}}, td, true); err != nil {
		return err
	}
	if i.signer, i.key, err = newSigner(td); err != nil {
		return err
	}
	i.ledger, err = audit.Open(filepath.Join(dir, "in-process"), audit.Options{})
	return err
}

// newSigner makes a root, and an intermediate under it.
func newSigner(td spiffeid.TrustDomain) (*issuance.Issuer, *ecdsa.PrivateKey, error) {
	now := time.Now()
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	root, err := issuance.NewRoot(td, rootKey, 365*24*time.Hour, now)
	if err != nil {
		return nil, nil, err
	}
	r := issuance.IntermediateRequest{TrustDomain: td, PublicKey: key.Public(), NotAfter: now.Add(14 * 24 * time.Hour), ExcludeNames: true}
	cert, err := issuance.SignIntermediate(root, rootKey, r, now)
	if err != nil {
		return nil, nil, err
	}
	iss, err := issuance.NewIssuer(td, []*x509.Certificate{cert}, root, key)
	return iss, key, err
}

// inProcess is how long, and whether each signature is checked, as it always is in the CA.
type inProcess struct {
	Seconds float64
	Checked bool
}

// made is what came of it.
type made struct {
	SVIDs   int
	Seconds float64
	CPU     float64 // seconds of a processor for one
}

func (i *issuer) run(ctx context.Context, r inProcess) (made, error) {
	before, err := spent(os.Getpid())
	if err != nil {
		return made{}, err
	}
	var n atomic.Int64
	var wg sync.WaitGroup
	failures := make([]error, len(i.asks))
	began := time.Now()
	until := began.Add(time.Duration(r.Seconds * float64(time.Second)))
	for k, a := range i.asks {
		wg.Go(func() {
			for time.Now().Before(until) && failures[k] == nil {
				failures[k] = i.issue(ctx, a, r.Checked)
				n.Add(1)
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(began)
	after, err := spent(os.Getpid())
	if err := errors.Join(append(failures, err)...); err != nil {
		return made{}, err
	}
	return made{SVIDs: int(n.Load()), Seconds: elapsed.Seconds(), CPU: (after - before).Seconds() / float64(n.Load())}, nil
}

// issue makes one SVID. Unchecked, it is signed and thrown away.
func (i *issuer) issue(ctx context.Context, a asked, checked bool) error {
	now := time.Now()
	claims, err := i.attestor.Attest(ctx, a.evidence, "signet:"+trustDomain, now)
	if err != nil {
		return err
	}
	d, err := i.policy.Decide(claims)
	if err != nil {
		return err
	}
	csr, err := issuance.ParseCSR(a.csr, i.policy.Keys())
	if err != nil {
		return err
	}
	if err := csr.Match(d.ID); err != nil {
		return err
	}
	p, err := issuance.Prepare(issuance.Profile{TTL: d.TTL}, issuance.Request{ID: d.ID, PublicKey: csr.PublicKey, DNSNames: d.DNSNames}, i.signer, now)
	if err != nil {
		return err
	}
	e := audit.Entry{
		Time: now, Kind: audit.KindIssue, CorrelationID: api.NewCorrelationID(), SPIFFEID: d.ID.String(),
		Cluster: claims.Issuer, Namespace: claims.Namespace, ServiceAccount: claims.ServiceAccount, ServiceAccountUID: claims.ServiceAccountUID,
		Pod: claims.PodName, PodUID: claims.PodUID, Node: claims.NodeName, NodeUID: claims.NodeUID, TokenID: claims.TokenID,
		Serial: p.Serial(), NotAfter: p.NotAfter(), Issuer: hex.EncodeToString(i.signer.Certificate().SubjectKeyId),
		Method: "Issue", Caller: "spiffe://" + trustDomain + "/signet/agent/0b7ffe5c", CallerNode: claims.NodeName, CallerNodeUID: claims.NodeUID,
	}
	if err := i.ledger.Append(ctx, e); err != nil {
		return err
	}
	if !checked {
		hash := p.Hash()
		_, err := ecdsa.SignASN1(rand.Reader, i.key, hash[:])
		return err
	}
	_, err = p.Sign()
	return err
}

// benchInProcess is issuance without a network, beside the same without the check of our own signature, which no CA of ours
// leaves out.
func benchInProcess(ctx context.Context, b *bench) error {
	f := b.figures
	f.declare("inprocess_of_ceiling", "SVIDs without a network, 64 at once, of the ceiling's on the same processors", "share")
	f.declare("inprocess_cpu_over_crypto", "processor time of an SVID without a network, over the bare cryptography's", "ratio")
	f.declare("inprocess_svids", "SVIDs without a network, 64 at once", "SVIDs a second")
	f.declare("inprocess_unchecked_svids", "SVIDs without a network and without the check of our own signature, which is never left out", "SVIDs a second")
	f.declare("own_check_cpu_share", "what the check of our own signature is of an SVID's processor time without a network", "share").anySpread()
	dir, err := os.MkdirTemp(b.dir, "inprocess-")
	if err != nil {
		return err
	}
	i, err := b.child(dir, "issuer", b.server)
	if err != nil {
		return err
	}
	defer i.end()
	top, err := b.child(dir, "ceiling", b.server)
	if err != nil {
		return err
	}
	defer top.end()
	if _, err := ask[struct{}](i, "make", dir); err != nil {
		return err
	}
	if _, err := ask[made](i, "issue", inProcess{0.5, true}); err != nil { // warm
		return err
	}
	err = b.rounds(func() (bool, error) { return b.inProcessRound(i, top) })
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}

func (b *bench) inProcessRound(i, top *process) (bool, error) {
	before, quiet1, err := b.ceiling(top, 0.25)
	if err != nil {
		return false, err
	}
	win, err := open(i.pid(), top.pid())
	if err != nil {
		return false, err
	}
	var sum [2]made // unchecked, checked: by turns, so that both meet the same machine
	turns := 6
	if b.short {
		turns = 2
	}
	for range turns {
		for k := range sum {
			m, err := ask[made](i, "issue", inProcess{0.25, k == 1})
			if err != nil {
				return false, err
			}
			sum[k].CPU += m.CPU * float64(m.SVIDs)
			sum[k].SVIDs, sum[k].Seconds = sum[k].SVIDs+m.SVIDs, sum[k].Seconds+m.Seconds
		}
	}
	t, err := win.close()
	if err != nil {
		return false, err
	}
	after, quiet2, err := b.ceiling(top, 0.25)
	if err != nil || !quiet1 || !quiet2 || t.foreign > b.noise {
		return false, err
	}
	unchecked, checked := sum[0], sum[1]
	each := checked.CPU / float64(checked.SVIDs)
	f := b.figures
	f.add("inprocess_svids", float64(checked.SVIDs)/checked.Seconds)
	f.add("inprocess_unchecked_svids", float64(unchecked.SVIDs)/unchecked.Seconds)
	f.add("inprocess_of_ceiling", float64(checked.SVIDs)/checked.Seconds/((before.Rate+after.Rate)/2))
	f.add("inprocess_cpu_over_crypto", each/((before.CPU+after.CPU)/2))
	f.add("own_check_cpu_share", max(0, 1-unchecked.CPU/float64(unchecked.SVIDs)/each))
	return true, nil
}
