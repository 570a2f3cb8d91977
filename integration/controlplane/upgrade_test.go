//go:build cluster

package controlplane_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/deploy"
	"github.com/signet-ca/signet/integration/controlplane"
)

// previousVariable names the environment variable with the folder of the version that was released last; `make e2e` builds
// it where the history has it.
const previousVariable = "SIGNET_PREVIOUS"

// A real API server takes an upgrade from the version that was released last, and refuses every way back to a CA that could
// not read the record, before it has changed anything of the one that can.
//
// threat: E23
func TestUpgrade(t *testing.T) {
	c := controlplane.Start(t)
	apply := func(manifests []byte) error {
		_, err := kubectl(t, c, manifests, "apply", "-f", "-")
		return err
	}
	installed, err := deploy.Install(deploy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	previous := previousInstall(t)
	if previous != nil {
		if err := apply(previous); err != nil {
			t.Fatal("the previous version: ", err)
		}
	}
	if err := apply(installed); err != nil {
		t.Fatal("the upgrade: ", err)
	}

	// Nothing is published yet: whoever installs in haste, or goes back because no CA ever ran, is not kept from it.
	const schema = `signet.dev/record-schema: "3"`
	if n := bytes.Count(installed, []byte(schema)); n != 1 {
		t.Fatalf("%s is there %d times", schema, n)
	}
	var own []byte // what is told of the CA, without the rest
	for doc := range bytes.SplitSeq(installed, []byte("---\n")) {
		if bytes.Contains(doc, []byte("kind: StatefulSet\n")) {
			own = doc
		}
	}
	reads := func(annotation string) []byte { return bytes.Replace(own, []byte(schema), []byte(annotation), 1) }
	other := func(text string) []byte { return reads(`example.org/other: "` + text + `"`) } // as a version that knows nothing of it
	if err := apply(other("first")); err != nil {
		t.Error("back to the version before, of whose record nothing is known: ", err)
	}
	if err := apply(own); err != nil {
		t.Fatal(err)
	}
	// publish does as the CA does.
	publish := func(record string) {
		t.Helper()
		if err := apply([]byte(`{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "signet-bundle", "namespace": "signet-system",
			"annotations": {"signet.dev/record-schema": "` + record + `"}}}`)); err != nil {
			t.Fatal(err)
		}
	}
	publish("3")
	denied := func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "'signet-downgrade'") && strings.Contains(err.Error(), "STATE_NEWER") && strings.Contains(err.Error(), "docs/upgrades.md")
	}
	// A policy is in force a moment after what it goes by was changed. Each try is another object, or nothing would be asked.
	becomes := func(name string, manifests []byte, want bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		for {
			_, err := kubectl(t, c, manifests, "apply", "--dry-run=server", "-f", "-")
			if denied(err) == want && (err == nil) != want {
				return
			}
			select {
			case <-ctx.Done():
				t.Fatalf("%s: %v", name, err)
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	becomes("it is in force", other("second"), true)
	for _, tc := range []struct {
		name      string
		manifests []byte
		denied    bool
	}{
		{"the same again", own, false},
		{"another image", bytes.ReplaceAll(own, []byte("signet-ca:devel"), []byte("signet-ca:other")), false},
		{"a version that reads more", reads(`signet.dev/record-schema: "4"`), false},
		{"a version that reads less", reads(`signet.dev/record-schema: "2"`), true},
		{"a version that does not say it", other("third"), true},
		{"what is no number", reads(`signet.dev/record-schema: "two"`), true},
	} {
		_, err := kubectl(t, c, tc.manifests, "apply", "--dry-run=server", "-f", "-")
		if denied(err) != tc.denied || (err == nil) == tc.denied {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if previous != nil {
		if err := apply(previous); !denied(err) {
			t.Error("back to the previous version: ", err)
		}
		if out, err := kubectl(t, c, nil, "get", "statefulset", "-n", "signet-system", "signet-ca", "-o", "jsonpath={.spec.template.spec.containers[0].image}"); err != nil || out != "localhost/signet-ca:devel" {
			t.Errorf("the CA is %q, %v", out, err)
		}
		if err := apply(installed); err != nil { // what was gone back of the rest comes again
			t.Error(err)
		}
	}
	if _, err := kubectl(t, c, nil, "scale", "-n", "signet-system", "statefulset/signet-ca", "--replicas=0"); err != nil {
		t.Error("scaling: ", err)
	}
	if _, err := kubectl(t, c, nil, "delete", "-n", "signet-system", "statefulset/signet-ca"); err != nil {
		t.Fatal(err)
	}
	if err := apply(other("fourth")); !denied(err) {
		t.Error("made anew: ", err)
	}
	publish("no number")
	becomes("what is no number is no reason", other("fifth"), false)
	publish("3")
	becomes("it is in force again", other("sixth"), true)
	if _, err := kubectl(t, c, nil, "delete", "validatingadmissionpolicybinding", "signet-downgrade"); err != nil { // as docs/upgrades.md says
		t.Fatal(err)
	}
	old := other("seventh")
	if previous != nil {
		old = previous
	}
	becomes("it is not in force", old, false)
	if err := apply(old); err != nil {
		t.Error("once a backup was restored: ", err)
	}
}

// previousInstall is what `signet install` of the previous version prints; nil where that was not built.
func previousInstall(t *testing.T) []byte {
	t.Helper()
	dir := os.Getenv(previousVariable)
	if dir == "" {
		t.Log(previousVariable + " names no previous version, so only this one's way is tested")
		return nil
	}
	out, err := exec.Command(filepath.Join(dir, "bin", "signet"), "install").Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("%v: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	return out
}
