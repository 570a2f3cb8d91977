//go:build linux

package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// tokens attests ServiceAccount tokens against a key set, and verifies the signatures of those same tokens bare.
type tokens struct{}

// attests says which tokens, and for how long, on one processor.
type attests struct {
	Algorithm string
	Seconds   float64
}

// attested is how many tokens a second were attested, and how many signatures verified bare, by turns.
type attested struct{ Tokens, Bare float64 }

func (s *tokens) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	if what != "attest" {
		return nil, errUnknown
	}
	return with(arg, func(a attests) (any, error) { return s.attest(ctx, a) })
}

func (s *tokens) attest(ctx context.Context, a attests) (attested, error) {
	kube, err := attestortest.NewIssuer(attestortest.Config{Issuer: issuerName, Algorithm: a.Algorithm})
	if err != nil {
		return attested{}, err
	}
	keys, err := attestor.StaticKeys(kube.JWKS())
	if err != nil {
		return attested{}, err
	}
	at, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{issuerName: keys}})
	if err != nil {
		return attested{}, err
	}
	var all []string
	for n := range 32 {
		token, err := kube.Token(attestortest.NewPod("shop", fmt.Sprintf("web-%d", n), "web", nodeName(0)), "signet:"+trustDomain, time.Hour)
		if err != nil {
			return attested{}, err
		}
		all = append(all, token)
	}
	key, err := keys.Lookup(ctx, kube.KeyID(), a.Algorithm)
	if err != nil {
		return attested{}, err
	}
	return alternate(time.Duration(a.Seconds*float64(time.Second)), len(all), func(i int) error {
		e := attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(all[i])}
		_, err := at.Attest(ctx, e, "signet:"+trustDomain, time.Now())
		return err
	}, func(i int) error { return verifyBare(key, all[i]) })
}

// alternate does the two by turns, n times each, so that both meet the same machine, and returns how often a second each was
// done.
func alternate(d time.Duration, n int, one, other func(int) error) (attested, error) {
	var took [2]time.Duration
	turns := 0
	for until := time.Now().Add(d); turns == 0 || time.Now().Before(until); turns++ {
		for k, f := range []func(int) error{one, other} {
			began := time.Now()
			for i := range n {
				if err := f(i); err != nil {
					return attested{}, err
				}
			}
			took[k] += time.Since(began)
		}
	}
	times := float64(turns * n)
	return attested{times / took[0].Seconds(), times / took[1].Seconds()}, nil
}

// verifyBare verifies the signature of a token and looks at nothing else.
func verifyBare(key crypto.PublicKey, token string) error {
	dot := strings.LastIndexByte(token, '.')
	sig, err := base64.RawURLEncoding.DecodeString(token[dot+1:])
	if err != nil {
		return err
	}
	hash := sha256.Sum256([]byte(token[:dot]))
	switch key := key.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, hash[:], sig)
	case *ecdsa.PublicKey:
		if ecdsa.Verify(key, hash[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
			return nil
		}
	}
	return errors.New("the token's signature is not good")
}

// benchAttestation is a ServiceAccount token on its own, checked against the issuer's key set.
func benchAttestation(ctx context.Context, b *bench) error {
	f := b.figures
	algorithms := []string{"RS256", "ES256"}
	for _, alg := range algorithms {
		name := "attest_" + strings.ToLower(alg)
		f.declare(name+"_of_bare", alg+" tokens attested against a key set, of their bare signatures verified", "share")
		f.declare(name+"_tokens", alg+" tokens attested by one processor", "tokens a second")
	}
	dir, err := os.MkdirTemp(b.dir, "attestation-")
	if err != nil {
		return err
	}
	p, err := b.child(dir, "attestor", b.server)
	if err != nil {
		return err
	}
	defer p.end()
	err = b.rounds(func() (bool, error) {
		for _, alg := range algorithms {
			win, err := open(p.pid())
			if err != nil {
				return false, err
			}
			a, err := ask[attested](p, "attest", attests{alg, 0.5})
			if err != nil {
				return false, err
			}
			t, err := win.close()
			if err != nil || t.foreign > b.noise {
				return false, err
			}
			name := "attest_" + strings.ToLower(alg)
			f.add(name+"_of_bare", a.Tokens/a.Bare)
			f.add(name+"_tokens", a.Tokens)
		}
		return true, nil
	})
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}
