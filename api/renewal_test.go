package api

import (
	"bytes"
	"testing"
)

// No two pairs of ticket and request have the same digest, wherever one ends and the other begins.
func TestRenewalDigest(t *testing.T) {
	one := RenewalDigest([]byte("ticket"), []byte("request"))
	if again := RenewalDigest([]byte("ticket"), []byte("request")); again != one {
		t.Error("the same is not the same")
	}
	for _, other := range []struct{ name, ticket, csr string }{
		{"another ticket", "tickes", "request"},
		{"another request", "ticket", "requesu"},
		{"the border moved", "ticketr", "equest"},
		{"swapped", "request", "ticket"},
		{"all in one", "ticketrequest", ""},
		{"nothing", "", ""},
	} {
		if RenewalDigest([]byte(other.ticket), []byte(other.csr)) == one {
			t.Errorf("%s has the same digest", other.name)
		}
	}
	long := bytes.Repeat([]byte("x"), 1<<16)
	if RenewalDigest(long, nil) == RenewalDigest(long[1:], long[:1]) {
		t.Error("length does not count")
	}
}
