package api

import "strings"

// IsLabel reports whether s is a DNS label as Kubernetes has them: RFC 1123, lower case, 1 to 63 bytes. Namespaces are.
func IsLabel(s string) bool { return len(s) <= 63 && isDNSPart(s) }

// IsSubdomain reports whether s is a DNS subdomain as Kubernetes has them: at most 253 bytes, and parts may be longer than a
// DNS label. Pods, ServiceAccounts and nodes have such names.
func IsSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !isDNSPart(part) {
			return false
		}
	}
	return true
}

func isDNSPart(s string) bool {
	for i := range len(s) {
		b := s[i]
		alnum := 'a' <= b && b <= 'z' || '0' <= b && b <= '9'
		if !alnum && (b != '-' || i == 0 || i == len(s)-1) {
			return false
		}
	}
	return s != ""
}

// IsUID reports whether s can stand for a UID or a jti: 1 to 64 letters, digits and hyphens. Kubernetes writes UUIDs, but
// does not promise to.
func IsUID(s string) bool {
	for i := range len(s) {
		b := s[i]
		if !('a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || b == '-') {
			return false
		}
	}
	return 0 < len(s) && len(s) <= 64
}
