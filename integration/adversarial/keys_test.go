package adversarial

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
)

// unsigned is a request for a key whose private half nobody needs: what is wrong with the key is told first.
func unsigned(spki []byte) []byte {
	return tlv(0x30, tlv(0x30, []byte{2, 1, 0}, tlv(0x30), spki, tlv(0xa0)), ecdsaSHA256, tlv(3, []byte{0}, make([]byte, 70)))
}

func integer(n *big.Int) []byte {
	der, err := asn1.Marshal(n)
	if err != nil {
		panic(err) // no *big.Int fails
	}
	return der
}

func rsaSPKI(n, e *big.Int) []byte {
	algorithm := tlv(0x30, []byte{6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1}, []byte{5, 0})
	return tlv(0x30, algorithm, tlv(3, []byte{0}, tlv(0x30, integer(n), integer(e))))
}

func ecSPKI(curve, point []byte) []byte {
	return tlv(0x30, tlv(0x30, []byte{6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1}, curve), tlv(3, []byte{0}, point))
}

// TestRequestRSA brings RSA keys that others can break, or that cost too much to look at.
//
// threat: C13, C14, CVE-2017-15361
func TestRequestRSA(t *testing.T) {
	withCSRs(t, 60, func(t *testing.T, a csrAsker) {
		f4, rnd := big.NewInt(65537), seed(4)
		number := func(bits int) *big.Int { // of exactly so many bits, odd
			b := make([]byte, (bits+7)/8)
			for i := range b {
				b[i] = byte(rnd.Uint32())
			}
			n := new(big.Int).SetBytes(b)
			n.SetBit(n.Rsh(n, uint(len(b)*8-bits)), bits-1, 1)
			return n.SetBit(n, 0, 1)
		}
		prime := func(from *big.Int) *big.Int {
			for n := new(big.Int).Set(from); ; n.Add(n, big.NewInt(2)) {
				if n.ProbablyPrime(4) {
					return n
				}
			}
		}
		good, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, good)
		if err != nil {
			t.Fatal(err)
		}
		v := variant{row: "C13", name: "RSA 2048", item: a.item(a.token), key: good.Public(), harmless: "a good key"}
		v.item.Csr = der
		a.variant(v)
		for _, bits := range []int{8, 64, 128, 256, 512, 768, 1023, 1024, 1536, 2040, 2047} {
			a.ask("C13", fmt.Sprint(bits, " bits"), unsigned(rsaSPKI(number(bits), f4)), "", api.WeakKey, api.CSRMalformed)
		}
		for _, bits := range []int{4097, 4104, 5120, 8192, 16384, 32768, 65536, 120_000} {
			a.ask("C14", fmt.Sprint(bits, " bits"), unsigned(rsaSPKI(number(bits), f4)), "", api.KeyTooLarge)
		}
		a.ask("C14", "200000 bits", unsigned(rsaSPKI(number(200_000), f4)), "", api.CSRTooLarge)
		for _, bits := range []int{2049, 2050, 2055, 3071, 4095} {
			a.ask("C13", fmt.Sprint(bits, " bits"), unsigned(rsaSPKI(number(bits), f4)), "", api.KeyType)
		}
		for name, e := range sorted(map[string]int64{"1": 1, "2": 2, "3": 3, "5": 5, "17": 17, "257": 257, "65535": 65535, "65536": 65536, "65538": 65538, "1<<20": 1 << 20}) {
			a.ask("C13", "exponent "+name, unsigned(rsaSPKI(good.N, big.NewInt(e))), "", api.WeakKey)
		}
		for name, e := range sorted(map[string]*big.Int{"0": big.NewInt(0), "-1": big.NewInt(-1), "-65537": big.NewInt(-65537)}) {
			a.ask("C13", "exponent "+name, unsigned(rsaSPKI(good.N, e)), "", api.CSRMalformed, api.WeakKey)
		}
		for _, bits := range []uint{31, 32, 33, 62, 63, 64, 256, 2047} {
			e := new(big.Int).Lsh(big.NewInt(1), bits)
			a.ask("C13", fmt.Sprintf("exponent 2^%d+1", bits), unsigned(rsaSPKI(good.N, e.Add(e, big.NewInt(1)))), "", api.KeyTooLarge, api.WeakKey, api.CSRMalformed)
		}
		for _, p := range []int64{3, 5, 7, 11, 13, 101, 167, 173, 547, 743, 751} {
			n := number(2040)
			for n.Mul(n, big.NewInt(p)); n.BitLen() < 2048; n.Lsh(n, 1) {
				n.Add(n, big.NewInt(p))
			}
			n.Sub(n, new(big.Int).Mod(n, big.NewInt(p)))
			if n.Bit(0) == 0 {
				n.Add(n, big.NewInt(p))
			}
			a.ask("C13", fmt.Sprint("a factor ", p), unsigned(rsaSPKI(n, f4)), "", api.WeakKey, api.KeyType)
		}
		a.ask("C13", "even", unsigned(rsaSPKI(new(big.Int).Sub(good.N, big.NewInt(1)), f4)), "", api.WeakKey)
		a.ask("C13", "negative", unsigned(rsaSPKI(new(big.Int).Neg(good.N), f4)), "", api.CSRMalformed)
		a.ask("C13", "zero", unsigned(rsaSPKI(new(big.Int), f4)), "", api.CSRMalformed, api.WeakKey)
		a.ask("C13", "twice as large", unsigned(rsaSPKI(new(big.Int).Lsh(good.N, 1), f4)), "", api.KeyType, api.WeakKey)
		half := number(1024)
		half.SetBit(half, 1022, 1)
		p := prime(half)
		a.ask("C13", "a square", unsigned(rsaSPKI(new(big.Int).Mul(p, p), f4)), "", api.WeakKey)
		for _, apart := range []int64{2, 1000, 1 << 40} {
			q := prime(new(big.Int).Add(p, big.NewInt(apart)))
			a.ask("C13", fmt.Sprint("primes ", apart, " apart"), unsigned(rsaSPKI(new(big.Int).Mul(p, q), f4)), "", api.WeakKey)
		}
		a.ask("C13", "made by the broken generator", unsigned(rsaSPKI(roca(number(2048)), f4)), "", api.WeakKey, api.KeyType)
	})
}

// roca returns a number near n with the fingerprint of CVE-2017-15361: modulo every small prime it is a power of 65537.
func roca(n *big.Int) *big.Int {
	m := big.NewInt(1)
	for p := int64(2); p <= 167; p++ {
		if q := big.NewInt(p); q.ProbablyPrime(0) {
			m.Mul(m, q)
		}
	}
	power := new(big.Int).Exp(big.NewInt(65537), big.NewInt(12345), m)
	n = new(big.Int).Sub(n, new(big.Int).Mod(n, m))
	return n.Add(n, power)
}

// TestRequestKeys brings keys of types, curves and encodings that are not accepted, and points that are none.
//
// threat: C15, C16
func TestRequestKeys(t *testing.T) {
	withCSRs(t, 80, func(t *testing.T, a csrAsker) {
		pub := a.key.Public().(*ecdsa.PublicKey)
		point, err := pub.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		p256 := []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}
		curves := map[string][]byte{
			"P-192": {6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 1}, "P-224": {6, 5, 0x2b, 0x81, 4, 0, 33}, "P-521": {6, 5, 0x2b, 0x81, 4, 0, 35}, "secp256k1": {6, 5, 0x2b, 0x81, 4, 0, 10}, "secp160r1": {6, 5, 0x2b, 0x81, 4, 0, 8},
			"sect283k1": {6, 5, 0x2b, 0x81, 4, 0, 16}, "brainpool 256": {6, 9, 0x2b, 0x24, 3, 3, 2, 8, 1, 1, 7}, "SM2": {6, 8, 0x2a, 0x81, 0x1c, 0xcf, 0x55, 1, 0x82, 0x2d}, "unknown": {6, 2, 0x2a, 3}, "none": {}, "null": {5, 0},
			"explicit": tlv(0x30, []byte{2, 1, 1}, tlv(0x30, []byte{6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 1, 1}, integer(pub.Params().P))), "twice": slices.Concat(p256, p256), "a text": tlv(12, []byte("P-256")), "empty OID": {6, 0},
		}
		for name, curve := range sorted(curves) {
			a.ask("C15", "curve "+name, unsigned(ecSPKI(curve, point)), "", api.KeyType)
		}
		flip := func(at int) []byte { b := bytes.Clone(point); b[at] ^= 1; return b }
		points := map[string][]byte{
			"off the curve": flip(64), "off the curve in x": flip(32), "infinity": {0}, "infinity, long": make([]byte, 65), "compressed": append([]byte{2 | point[64]&1}, point[1:33]...), "hybrid": append([]byte{6 | point[64]&1}, point[1:]...), "short": point[:64], "long": append(bytes.Clone(point), 0),
			"empty": {}, "only the form": {4}, "zero": append([]byte{4}, make([]byte, 64)...), "above p": append([]byte{4}, bytes.Repeat([]byte{0xff}, 64)...), "generator of P-384": slices.Concat([]byte{4}, elliptic.P384().Params().Gx.Bytes(), elliptic.P384().Params().Gy.Bytes()),
		}
		for name, b := range sorted(points) {
			a.ask("C15", "point "+name, unsigned(ecSPKI(p256, b)), "", api.WeakKey, api.CSRMalformed)
		}
		a.ask("C15", "point of P-256 on P-384", unsigned(ecSPKI([]byte{6, 5, 0x2b, 0x81, 4, 0, 34}, point)), "", api.WeakKey, api.CSRMalformed)
		oid := func(b ...byte) []byte { return tlv(0x30, tlv(6, b)) }
		for name, algorithm := range sorted(map[string][]byte{
			"DSA": oid(0x2a, 0x86, 0x48, 0xce, 0x38, 4, 1), "DH": oid(0x2a, 0x86, 0x48, 0xce, 0x3e, 2, 1), "X25519": oid(0x2b, 0x65, 0x6e), "X448": oid(0x2b, 0x65, 0x6f), "Ed448": oid(0x2b, 0x65, 0x71), "RSA-PSS": oid(0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 10),
			"RSA-OAEP": oid(0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 7), "RSA without null": oid(0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1), "ML-DSA-65": oid(0x60, 0x86, 0x48, 1, 0x65, 3, 4, 3, 18), "GOST": oid(0x2a, 0x85, 3, 7, 1, 1, 1, 1), "nothing": tlv(0x30), "unknown": oid(0x2a, 3),
		}) {
			for _, n := range []int{0, 32, 65, 1952} {
				a.ask("C15", fmt.Sprint(name, " of ", n, " bytes"), unsigned(tlv(0x30, algorithm, tlv(3, []byte{0}, make([]byte, n)))), "", api.KeyType, api.CSRMalformed)
			}
		}
		for name, b := range sorted(map[string]byte{"zero": 0, "one": 1, "two": 2, "ones": 0xff}) { // Ed25519 is off unless the policy says so
			a.ask("C16", "Ed25519 "+name, unsigned(tlv(0x30, oid(0x2b, 0x65, 0x70), tlv(3, []byte{0}, bytes.Repeat([]byte{b}, 32)))), "", api.KeyType)
		}
	})
}

// TestRequestExtensions asks for all that is the CA's alone, in each place where it can be asked for.
//
// threat: C01, CVE-2026-40097, GHSA-g892
func TestRequestExtensions(t *testing.T) {
	withCSRs(t, 400, func(t *testing.T, a csrAsker) {
		forbidden := api.CSRForbiddenExtension
		values := map[string][]byte{"empty": {}, "an empty SEQUENCE": tlv(0x30), "CA:TRUE": tlv(0x30, []byte{1, 1, 0xff}), "CA:TRUE, path length 0": tlv(0x30, []byte{1, 1, 0xff}, []byte{2, 1, 0}), "keyCertSign": {3, 2, 2, 4}}
		for id := range byte(60) {
			if id == 17 {
				continue
			}
			for name, value := range sorted(values) {
				ext := extension([]byte{6, 3, 0x55, 0x1d, id}, value)
				a.ask("C01", fmt.Sprintf("2.5.29.%d %s", id, name), request(t, a.key, extensions(ext)), "", forbidden)
				if name == "an empty SEQUENCE" {
					a.ask("C01", fmt.Sprintf("2.5.29.%d before the name", id), request(t, a.key, extensions(ext, san(ownURI))), "", forbidden)
					a.ask("C01", fmt.Sprintf("2.5.29.%d behind the name", id), request(t, a.key, extensions(san(ownURI), ext)), "", forbidden)
				}
			}
		}
		oid := func(b ...byte) []byte { return tlv(6, b) }
		for name, id := range sorted(map[string][]byte{
			"AIA": oid(0x2b, 6, 1, 5, 5, 7, 1, 1), "CT poison": oid(0x2b, 6, 1, 4, 1, 0xd6, 0x79, 2, 4, 3), "Netscape type": oid(0x60, 0x86, 0x48, 1, 0x86, 0xf8, 0x42, 1, 1), "MS template": oid(0x2b, 6, 1, 4, 1, 0x82, 0x37, 20, 2), "OCSP no check": oid(0x2b, 6, 1, 5, 5, 7, 0x30, 1, 5),
			"unknown": oid(0x2a, 3, 4), "of 1 KiB": tlv(6, bytes.Repeat([]byte{0x2a}, 1024)),
		}) {
			a.ask("C01", "extension "+name, request(t, a.key, extensions(extension(id, tlv(0x30)))), "", forbidden)
		}
		for name, id := range sorted(map[string][]byte{
			"challenge password": oid(0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 7), "unstructured name": oid(0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 2), "MS extensions": oid(0x2b, 6, 1, 4, 1, 0x82, 0x37, 2, 1, 14), "unknown": oid(0x2a, 3),
		}) {
			attribute := tlv(0x30, id, tlv(0x31, tlv(0x30, extension([]byte{6, 3, 0x55, 0x1d, 19}, values["CA:TRUE"]))))
			a.ask("C01", "attribute "+name, request(t, a.key, attribute), "", forbidden)
			a.ask("C01", "attribute "+name+" behind", request(t, a.key, extensions(san(ownURI)), attribute), "", forbidden)
			a.ask("C01", "attribute "+name+" before", request(t, a.key, attribute, extensions(san(ownURI))), "", forbidden)
		}
		own := san(ownURI)
		for name, attributes := range sorted(map[string][][]byte{
			"names twice": {extensions(own, own)}, "names in two attributes": {extensions(own), extensions(own)}, "an empty list, then names": {extensions(), extensions(own)}, "two values": {tlv(0x30, oidExtension, tlv(0x31, tlv(0x30, own), tlv(0x30, own)))},
			"no value": {tlv(0x30, oidExtension, tlv(0x31))}, "no set": {tlv(0x30, oidExtension)}, "critical as 1": {extensions(tlv(0x30, oidSAN, []byte{1, 1, 1}, tlv(4, tlv(0x30, ownURI))))}, "critical said to be false": {extensions(tlv(0x30, oidSAN, []byte{1, 1, 0}, tlv(4, tlv(0x30, ownURI))))},
			"names as text": {extensions(tlv(0x30, oidSAN, tlv(12, tlv(0x30, ownURI))))}, "a bare extension": {own}, "names in a set": {extensions(tlv(0x30, oidSAN, tlv(4, tlv(0x31, ownURI))))},
		}) {
			a.ask("C20", name, request(t, a.key, attributes...), "", api.CSRMalformed, forbidden)
		}
	})
}

// TestRequestText sends requests that are too large, wrapped, or written for a log.
//
// threat: C21, C22, C24, GHSA-g892
func TestRequestText(t *testing.T) {
	withCSRs(t, 50, func(t *testing.T, a csrAsker) {
		good := request(t, a.key)
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})
		for name, der := range sorted(map[string][]byte{ // CVE-2024-12401, CVE-2025-61723: PEM is not read at all
			"PEM": text, "two PEM": slices.Concat(text, text), "garbage and PEM": slices.Concat([]byte("x\n"), text), "PEM and garbage": slices.Concat(text, []byte("x")), "PEM headers": []byte(strings.Repeat("-----BEGIN ", 1000)), "old PEM": bytes.ReplaceAll(text, []byte("CERTIFICATE"), []byte("NEW CERTIFICATE")),
			"base64": []byte(base64.StdEncoding.EncodeToString(good)), "hex": fmt.Appendf(nil, "%x", good), "nothing": nil, "a NUL": {0}, "JSON": []byte(`{"csr":""}`), "twice": slices.Concat(good, good), "a certificate's shape": tlv(0x30, tlv(0x30, tlv(0xa0, []byte{2, 1, 2})), ecdsaSHA256, tlv(3, []byte{0})),
			"an empty SEQUENCE": tlv(0x30), "1000 deep": deep(1000, nil), "16 KiB of zeros": make([]byte, api.MaxCSRBytes), "16 KiB of ones": bytes.Repeat([]byte{0xff}, api.MaxCSRBytes), "as long as its header says": tlv(0x30, make([]byte, api.MaxCSRBytes-4)),
		}) {
			a.ask("C24", name, der, "", api.CSRMalformed)
		}
		for _, n := range []int{api.MaxCSRBytes + 1, 64<<10 + 1, 1 << 20, 2 << 20} {
			a.ask("C21", fmt.Sprint(n, " bytes"), append(bytes.Clone(good), make([]byte, n-len(good))...), "", api.CSRTooLarge)
			a.ask("C21", fmt.Sprint(n, " bytes of open ends"), bytes.Repeat([]byte{0x30, 0x80}, n/2+1), "", api.CSRTooLarge)
			a.ask("C21", fmt.Sprint(n, " bytes of PEM"), bytes.Repeat([]byte("-----BEGIN "), n/11+1), "", api.CSRTooLarge)
		}
		for name, s := range sorted(map[string]string{
			"a line of a log": "\n{\"level\":\"error\",\"msg\":\"" + stranger + "\"}", "control": "\x1b[2J\x07", "carriage return": "\rroot", "NUL": "\x00", "10 KiB": strings.Repeat(stranger, 1000), "another ID": "spiffe://example.org/signet/ca/ca-0", "not UTF-8": "\xff\xfe",
		}) {
			for kind, tag := range sorted(map[string]byte{"UTF-8": 12, "printable": 19, "BMP": 30, "T61": 20}) {
				a.log.take()
				subject := tlv(0x30, tlv(0x31, tlv(0x30, []byte{6, 3, 0x55, 4, 3}, tlv(tag, []byte(s)))))
				info := tlv(0x30, []byte{2, 1, 0}, subject, spkiOf(t, a.key.Public()), tlv(0xa0))
				a.ask("C22", "subject with "+name+", "+kind, signed(t, a.key, info), "the subject is skipped, whatever it holds")
				if log := a.log.take(); strings.Contains(log, stranger) || strings.ContainsAny(log, "\x1b\x00\r") {
					t.Errorf("the subject reached the log: %q", log)
				}
			}
		}
	})
}
