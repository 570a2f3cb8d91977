//go:build linux

package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"os"
	"runtime"
	"sync"
	"time"
)

// The lengths of what is hashed: a ServiceAccount token's signed part, the signed part of a CSR that names nothing, and a
// leaf's.
const (
	tokenBytes = 1100
	csrBytes   = 130
	leafBytes  = 480
)

// ceiling is the bare cryptography of an SVID: the token's signature (RS256, as a Kubernetes that kubeadm made signs it), the
// CSR's, our signature, and the check of that. Nothing is parsed, kept or sent.
type ceiling struct{}

// bare is what one SVID costs in cryptography alone, in seconds of one processor, by part; and how many are made a second
// by all processors together, with and without the check of our own signature.
type bare struct {
	Token, CSR, Sign, Own float64
	Rate, RateWithout     float64
	CPU                   float64 // seconds of a processor by the kernel's account, for the whole of one
}

func (c *ceiling) do(_ context.Context, what string, arg json.RawMessage) (any, error) {
	var seconds float64
	if what != "loop" {
		return nil, errUnknown
	}
	if err := json.Unmarshal(arg, &seconds); err != nil {
		return nil, err
	}
	issuer, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	token := sha256.Sum256(make([]byte, tokenBytes))
	tokenSig, err := rsa.SignPKCS1v15(rand.Reader, issuer, crypto.SHA256, token[:])
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var sum bare
	var n int
	var failed error
	before, err := spent(os.Getpid())
	if err != nil {
		return nil, err
	}
	until := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	workers := runtime.GOMAXPROCS(0)
	for range workers {
		wg.Go(func() {
			one, made, err := loop(&issuer.PublicKey, tokenSig, until)
			mu.Lock()
			defer mu.Unlock()
			sum.Token, sum.CSR, sum.Sign, sum.Own = sum.Token+one.Token, sum.CSR+one.CSR, sum.Sign+one.Sign, sum.Own+one.Own
			n += made
			failed = err
		})
	}
	wg.Wait()
	after, err := spent(os.Getpid())
	if err != nil {
		return nil, err
	}
	sum.CPU = (after - before).Seconds() / float64(n)
	for _, p := range []*float64{&sum.Token, &sum.CSR, &sum.Sign, &sum.Own} {
		*p /= float64(n)
	}
	without := sum.Token + sum.CSR + sum.Sign
	sum.RateWithout, sum.Rate = float64(workers)/without, float64(workers)/(without+sum.Own)
	return sum, failed
}

// loop returns the seconds that it spent on each part, all together.
func loop(issuer *rsa.PublicKey, tokenSig []byte, until time.Time) (sum bare, n int, err error) {
	ours, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return sum, 0, err
	}
	theirs, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return sum, 0, err
	}
	token, csr, leaf := make([]byte, tokenBytes), make([]byte, csrBytes), make([]byte, leafBytes)
	digest := sha256.Sum256(csr)
	csrSig, err := ecdsa.SignASN1(rand.Reader, theirs, digest[:])
	if err != nil {
		return sum, 0, err
	}
	for begin := time.Now(); begin.Before(until); begin = time.Now() {
		d := sha256.Sum256(token)
		if err := rsa.VerifyPKCS1v15(issuer, crypto.SHA256, d[:], tokenSig); err != nil {
			return sum, n, err
		}
		attested := time.Now()
		d = sha256.Sum256(csr)
		if !ecdsa.VerifyASN1(&theirs.PublicKey, d[:], csrSig) {
			return sum, n, errUnknown
		}
		checked := time.Now()
		d = sha256.Sum256(leaf)
		sig, err := ecdsa.SignASN1(rand.Reader, ours, d[:])
		if err != nil {
			return sum, n, err
		}
		signed := time.Now()
		if !ecdsa.VerifyASN1(&ours.PublicKey, d[:], sig) {
			return sum, n, errUnknown
		}
		sum.Token += attested.Sub(begin).Seconds()
		sum.CSR += checked.Sub(attested).Seconds()
		sum.Sign += signed.Sub(checked).Seconds()
		sum.Own += time.Since(signed).Seconds()
		n++
	}
	return sum, n, nil
}
