package upstream

import (
	"bytes"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
)

// TestBoth has two upstreams sign, each under its own roots, whichever of them is configured for the next root. Without the files'
// section there is nothing to sign with under their root.
func TestBoth(t *testing.T) {
	parts := Parts{Sealer: newSealer(t)}
	sealed, sealedCert := found(t, open(t, Config{}, parts).(ca.Founder), td)
	f, inFiles := newFiles(t), newRoot(t)
	f.write(t, inFiles)
	files := inFiles.authority()
	toFiles, toSealed, alone := f.config(false), f.config(false), Config{Kind: "selfsigned"}
	toSealed.Kind = "selfsigned"
	for _, tt := range []struct {
		name   string
		config Config
		files  api.Reason // why it does not sign under the root in files; empty: it does
	}{
		{"to files", toFiles, ""},
		{"to sealed", toSealed, ""},
		{"to sealed, the files forgotten", alone, api.UpstreamRoot},
	} {
		t.Run(tt.name, func(t *testing.T) {
			up := open(t, tt.config, parts)
			if err := up.Probe(t.Context(), td, sealed); err != nil {
				t.Errorf("probe of the sealed root: %v", err)
			}
			mintAndSign(t, up, sealed, sealedCert, false)
			if _, err := up.(ca.CrossSigner).CrossSign(t.Context(), td, sealed, inFiles.root); err != nil {
				t.Errorf("the sealed root signs the one in files: %v", err)
			}
			if err := up.Probe(t.Context(), td, files); (err != nil) != (tt.files != "") || err != nil && api.ReasonOf(err) != tt.files {
				t.Errorf("probe of the root in files: %v", err)
			}
			_, err := up.(ca.CrossSigner).CrossSign(t.Context(), td, files, sealedCert)
			if (err != nil) != (tt.files != "") || err != nil && api.ReasonOf(err) != tt.files {
				t.Errorf("the root in files signs the sealed one: %v", err)
			}
			if before := up.(ca.CrossProber).CanCross(t.Context(), td, files); api.ReasonOf(before) != api.ReasonOf(err) {
				t.Errorf("it says beforehand %v, and then %v", before, err)
			}
			if tt.files == "" {
				mintAndSign(t, up, files, inFiles.root, false)
			} else if _, err := up.Mint(t.Context(), request(t, files)); api.ReasonOf(err) != tt.files {
				t.Errorf("under the root in files: %v", err)
			}
			next, err := up.(ca.Founder).Found(t.Context(), td, time.Now())
			if err != nil || bytes.Equal(next.Certificate, files.Certificate) != (tt.config.Kind == "disk") {
				t.Errorf("the next root is from elsewhere: %v", err)
			}
		})
	}
}
