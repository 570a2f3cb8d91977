package api

import (
	"strings"
	"testing"
)

func TestKubernetesNames(t *testing.T) {
	for _, tt := range []struct {
		s                     string
		label, subdomain, uid bool
	}{
		{"", false, false, false},
		{"shop", true, true, true},
		{"a", true, true, true},
		{"0", true, true, true},
		{"shop-1", true, true, true},
		{"-shop", false, false, true},
		{"shop-", false, false, true},
		{"shop.web", false, true, false},
		{"shop..web", false, false, false},
		{".shop", false, false, false},
		{"shop.", false, false, false},
		{"shop.-web", false, false, false},
		{"Shop", false, false, true},
		{"shop_web", false, false, false},
		{"shop/web", false, false, false},
		{"..", false, false, false},
		{"sh\u00f6p", false, false, false},
		{"shop\n", false, false, false},
		{"shop\x00", false, false, false},
		{strings.Repeat("a", 63), true, true, true},
		{strings.Repeat("a", 64), false, true, true},
		{strings.Repeat("a", 65), false, true, false},
		{strings.Repeat("a", 253), false, true, false},
		{strings.Repeat("a", 254), false, false, false},
	} {
		if l, s, u := IsLabel(tt.s), IsSubdomain(tt.s), IsUID(tt.s); l != tt.label || s != tt.subdomain || u != tt.uid {
			t.Errorf("%.70q: label %t, subdomain %t, UID %t", tt.s, l, s, u)
		}
	}
}
