package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
)

// keyCommand is "key FILE": it writes another seal key, in all but its bytes like the right one.
func keyCommand(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), ca.NewSealKey(), 0o600))
}

// healthCommand is "health ADDRESS STATUS": it waits, a minute at most, for gRPC health to be that. Health is asked
// before there is any trust, so the server's certificate is not looked at.
func healthCommand(ts *testscript.TestScript, _ bool, args []string) {
	conn, err := grpc.NewClient(args[0], grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	ts.Check(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	last := ""
	for ctx.Err() == nil {
		resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
		if err == nil && resp.GetStatus().String() == args[1] {
			return
		}
		if last = resp.GetStatus().String(); err != nil {
			last = err.Error()
		}
		time.Sleep(50 * time.Millisecond)
	}
	ts.Fatalf("health is %s, want %s", last, args[1])
}

// noSecretsCommand is "nosecrets FOLDER": no file below it has the seal key or the private key of the root in it, in any
// form, but for the file of the seal key itself. The CA must not be running.
func noSecretsCommand(ts *testscript.TestScript, _ bool, args []string) {
	root := ts.MkAbs(args[0])
	sealKey, err := os.ReadFile(filepath.Join(root, "seal/key"))
	ts.Check(err)
	secrets := rootKey(ts, filepath.Join(root, "state/signet.db"), sealKey)
	secrets["the seal key"] = sealKey
	files := 0
	ts.Check(filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == filepath.Join(root, "seal/key") {
			return err
		}
		files++
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if bytes.Contains(data, []byte("PRIVATE KEY")) {
			ts.Fatalf("%s has a private key in it", path)
		}
		for name, secret := range secrets {
			for _, form := range forms(secret) {
				if bytes.Contains(data, form) {
					ts.Fatalf("%s has %s in it", path, name)
				}
			}
		}
		return nil
	}))
	if files < 8 {
		ts.Fatalf("only %d files were searched", files)
	}
}

// rootKey opens the private key of the root, as whoever has the seal key can.
func rootKey(ts *testscript.TestScript, path string, sealKey []byte) map[string][]byte {
	s, closeStore, err := store.Open(context.Background(), store.Config{Path: path}, false)
	ts.Check(err)
	defer closeStore()
	j, _, err := s.Load(context.Background())
	ts.Check(err)
	sealer, err := ca.NewSealer(sealKey)
	ts.Check(err)
	root := j.ActiveAuthority()
	der, err := sealer.Open(root.SealedKey, j.TrustDomain+"/"+root.ID)
	ts.Check(err)
	key, err := x509.ParsePKCS8PrivateKey(der)
	ts.Check(err)
	scalar, err := key.(*ecdsa.PrivateKey).Bytes()
	ts.Check(err)
	return map[string][]byte{"the root's key": der, "the root's private number": scalar}
}

// forms are the ways in which bytes can lie in a text: as they are, in hex, in base64 at any offset.
func forms(secret []byte) [][]byte {
	all := [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(strings.ToUpper(hex.EncodeToString(secret)))}
	for skip := range 3 {
		for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			text := enc.EncodeToString(secret[skip:])
			all = append(all, []byte(text[:len(text)-2])) // the last letter depends on what follows
		}
	}
	return all
}
