package api_test

import (
	"testing"

	"github.com/signet-ca/signet/api"
)

func TestProtocols(t *testing.T) {
	for _, tc := range []struct {
		name           string
		own            api.Protocols
		newest, oldest uint32 // as the peer says
		want           uint32
		older          bool // the peer is
		text           string
	}{
		{"the same", api.Protocols{Oldest: 1, Newest: 1}, 1, 1, 1, false, "1"},
		{"one that tells no oldest", api.Protocols{Oldest: 1, Newest: 2}, 1, 0, 1, false, "1"},
		{"one behind", api.Protocols{Oldest: 1, Newest: 2}, 1, 1, 1, false, "1"},
		{"one ahead", api.Protocols{Oldest: 1, Newest: 2}, 3, 2, 2, false, "2 to 3"},
		{"one ahead that tells no oldest", api.Protocols{Oldest: 1, Newest: 2}, 3, 0, 0, false, "3"},
		{"two behind", api.Protocols{Oldest: 2, Newest: 3}, 1, 1, 0, true, "1"},
		{"two ahead", api.Protocols{Oldest: 1, Newest: 2}, 4, 3, 0, false, "3 to 4"},
		{"all that there will be", api.Protocols{Oldest: 1, Newest: 2}, 1<<32 - 1, 1, 2, false, "1 to 4294967295"},
		{"nothing", api.Protocols{Oldest: 1, Newest: 2}, 0, 0, 0, true, "0"},
		{"no newest", api.Protocols{Oldest: 1, Newest: 2}, 0, 1, 0, true, "1 to 0"},
		{"upside down", api.Protocols{Oldest: 1, Newest: 2}, 1, 2, 0, false, "2 to 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			peer := api.ProtocolsOf(tc.newest, tc.oldest)
			if got := tc.own.Common(peer); got != tc.want {
				t.Errorf("they speak %d, want %d", got, tc.want)
			}
			if got := peer.Common(tc.own); got != tc.want {
				t.Errorf("the other way round they speak %d, want %d", got, tc.want)
			}
			if got := peer.Older(tc.own); got != tc.older {
				t.Errorf("Older is %t", got)
			}
			if got := peer.String(); got != tc.text {
				t.Errorf("it is called %q, want %q", got, tc.text)
			}
		})
	}
}

// TestProtocolsOfThisBuild: who is one version behind, or ahead, is served.
func TestProtocolsOfThisBuild(t *testing.T) {
	p := api.SpokenProtocols()
	if p.Newest != api.Protocol || p.Oldest < 1 || p.Oldest != max(1, p.Newest-1) {
		t.Errorf("this build speaks %s", p)
	}
}
