package daemontest

import (
	"net"
	"testing"
)

// Who draws an address has it: nobody else draws it before he has bound it, and he can.
func TestFreeAddress(t *testing.T) {
	drawn := map[string]bool{}
	for range 400 {
		address, err := FreeAddress()
		if err != nil {
			t.Fatal(err)
		}
		if drawn[address] {
			t.Errorf("%s was drawn twice", address)
		}
		drawn[address] = true
	}
	for address := range drawn {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Errorf("it cannot be bound: %v", err)
			continue
		}
		l.Close()
	}
}
