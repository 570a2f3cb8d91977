package attestor

import (
	"context"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/signet-ca/signet/api"
)

// FromMetadata makes evidence of the values of one `authorization` key: exactly one value, which is a token, with or
// without "Bearer " before it (RFC 6750 section 2.1; the scheme in any case). It fails with api.TokenMissing,
// api.TokenTooLarge, or api.TokenAmbiguous for more than one token or anything beside it.
func FromMetadata(values []string) (Evidence, error) {
	switch {
	case len(values) == 0:
		return Evidence{}, api.E(api.TokenMissing, "there is no token")
	case len(values) > 1:
		return Evidence{}, api.E(api.TokenAmbiguous, "there are %d authorization values", len(values))
	}
	token, scheme := values[0], "bearer"
	if len(token) > len(scheme)+1+api.MaxTokenBytes {
		return Evidence{}, api.E(api.TokenTooLarge, "the token is above %d bytes", api.MaxTokenBytes)
	}
	if head, tail, ok := strings.Cut(token, " "); strings.EqualFold(head, scheme) {
		token = tail
		if !ok {
			token = ""
		}
	}
	return fromToken([]byte(token))
}

// fromToken refuses what can be no single token. Whether it is one is for the Attestor to say.
func fromToken(token []byte) (Evidence, error) {
	if err := checkSize(token); err != nil {
		return Evidence{}, err
	}
	if slices.ContainsFunc(token, separates) {
		return Evidence{}, errAmbiguous()
	}
	return Evidence{Kind: api.EvidenceServiceAccount, Data: token}, nil
}

// TokenFile proves the ServiceAccount of the calling pod by the token that kubelet projects into it.
type TokenFile struct {
	Path string // read anew for each proof: kubelet replaces the token at 80 % of its life
}

var _ Prover = TokenFile{}

// Prove reads the file. One newline at its end is dropped: kubelet writes none, but a token file made by hand has one, and
// a token never does. It fails with api.TokenMissing for a file that cannot be read or is empty, api.TokenTooLarge,
// api.TokenAmbiguous.
func (f TokenFile) Prove(context.Context) (Evidence, error) {
	data, err := readFile(f.Path, api.MaxTokenBytes+2) // a token, a newline, and one byte too many
	if err != nil {
		return Evidence{}, api.Wrap(api.TokenMissing, err, "the token file cannot be read")
	}
	if n := len(data); n > 0 && data[n-1] == '\n' {
		data = data[:n-1]
	}
	return fromToken(data)
}

// readFile reads at most limit bytes of a regular file. Anything else (a FIFO, a device) could block or never end.
func readFile(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &os.PathError{Op: "read", Path: path, Err: os.ErrInvalid}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
