// Package httpsig signs and verifies HTTP requests (RFC 9421) in one profile:
// [Sign] a request that is about to be sent, [Verify] one that arrived. It makes the
// signature base itself, from the request; nothing here signs or takes a base
// from outside. docs/protocol.md has the profile.
package httpsig

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"

	"inkan/internal/jws"
)

// Fields of a request (RFC 9421, section 4; RFC 9530, section 2).
const (
	SignatureInput = "Signature-Input"
	Signature      = "Signature"
	ContentDigest  = "Content-Digest"
	AgentAction    = "Agent-Action"
)

// The profile.
const (
	// Label names the signature among others of a request.
	Label = "agent"
	// Tag says what the signature is for: that of Web Bot Auth, whose verifiers
	// take a signature that covers more than they ask for.
	Tag = "web-bot-auth"
	// Lifetime of a signature that is made.
	Lifetime = time.Minute
	// MaxLifetime of one that is accepted.
	MaxLifetime = 5 * time.Minute
)

// Maxima of what is parsed, in bytes.
const (
	maxInput  = 4 << 10
	maxDigest = 1 << 10
)

// algorithms of RFC 9421, section 3.3, by those of JOSE for the same key. The
// forms of the signatures are the same.
var algorithms = map[string]string{"ES256": "ecdsa-p256-sha256", "ES384": "ecdsa-p384-sha384", "EdDSA": "ed25519"}

func algorithm(key crypto.PublicKey) (jose, alg string, err error) {
	jose, _, err = jws.Algorithm(key)
	if err != nil {
		return "", "", err
	}
	if alg = algorithms[jose]; alg == "" {
		return "", "", errors.New("a key on P-256 or P-384, or Ed25519 is expected")
	}
	return jose, alg, nil
}

// Thumbprint is the key's id: the SHA-256 of its JWK in base64url (RFC 7638, RFC 8037).
func Thumbprint(key crypto.PublicKey) (string, error) {
	encode := base64.RawURLEncoding.EncodeToString
	var jwk string
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return "", err
		}
		size := (len(point) - 1) / 2
		jwk = fmt.Sprintf(`{"crv":%q,"kty":"EC","x":%q,"y":%q}`, k.Params().Name, encode(point[1:1+size]), encode(point[1+size:]))
	case ed25519.PublicKey:
		jwk = fmt.Sprintf(`{"crv":"Ed25519","kty":"OKP","x":%q}`, encode(k))
	default:
		return "", errors.New("a key on P-256 or P-384, or Ed25519 is expected")
	}
	sum := sha256.Sum256([]byte(jwk))
	return encode(sum[:]), nil
}

// Digest is the value of Content-Digest for a body.
func Digest(body []byte) string {
	sum := sha256.Sum256(body)
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
}

// CheckDigest holds a body against the values of Content-Digest. Every digest of a
// kind that is known must be the body's, and one of them must be there.
func CheckDigest(values []string, body []byte) error {
	if len(strings.Join(values, "")) > maxDigest {
		return fmt.Errorf("%s has more than %d bytes", ContentDigest, maxDigest)
	}
	d, err := httpsfv.UnmarshalDictionary(values)
	if err != nil {
		return fmt.Errorf("%s is not a dictionary: %w", ContentDigest, err)
	}
	known := false
	for _, name := range d.Names() {
		var want []byte
		switch name {
		case "sha-256":
			sum := sha256.Sum256(body)
			want = sum[:]
		case "sha-512":
			sum := sha512.Sum512(body)
			want = sum[:]
		default:
			continue
		}
		known = true
		m, _ := d.Get(name)
		item, ok := m.(httpsfv.Item)
		got, isBytes := item.Value.([]byte)
		if !ok || !isBytes || subtle.ConstantTimeCompare(got, want) != 1 {
			return fmt.Errorf("the %s in %s is not the body's", name, ContentDigest)
		}
	}
	if !known {
		return fmt.Errorf("%s has neither sha-256 nor sha-512", ContentDigest)
	}
	return nil
}

// components are what a signature covers, in this order. A query is covered where
// there is one.
func components(req *http.Request) []string {
	out := []string{"@method", "@authority", "@path"}
	if req.URL.RawQuery != "" || req.URL.ForceQuery {
		out = append(out, "@query")
	}
	return append(out, "content-digest", "agent-action")
}

// component returns a component's value (RFC 9421, section 2).
func component(req *http.Request, name string) (string, error) {
	switch name {
	case "@method":
		return req.Method, nil
	case "@authority":
		host := req.Host
		if host == "" {
			host = req.URL.Host
		}
		return strings.TrimSuffix(strings.ToLower(host), ":443"), nil // requests go over https
	case "@path":
		if p := req.URL.EscapedPath(); p != "" {
			return p, nil
		}
		return "/", nil
	case "@query":
		return "?" + req.URL.RawQuery, nil
	}
	values := req.Header.Values(name)
	if len(values) != 1 {
		return "", fmt.Errorf("%d fields %s, exactly one is expected", len(values), http.CanonicalHeaderKey(name))
	}
	return strings.TrimSpace(values[0]), nil
}

// base makes the signature base (RFC 9421, section 2.5). input is the value of its
// last line.
func base(req *http.Request, input string) ([]byte, error) {
	var b strings.Builder
	for _, name := range components(req) {
		v, err := component(req, name)
		if err != nil {
			return nil, err
		}
		if strings.IndexFunc(v, func(r rune) bool { return r < ' ' || r > '~' }) >= 0 {
			return nil, fmt.Errorf("%s has other characters than printable ASCII", name)
		}
		fmt.Fprintf(&b, "%q: %s\n", name, v)
	}
	fmt.Fprintf(&b, `"@signature-params": %s`, input)
	return []byte(b.String()), nil
}

// Sign signs a request that is about to be sent over https, with the body that it
// will have. It sets Content-Digest, Signature-Input and Signature; a request that has one of
// the last two, or another digest, is refused: they would be somebody else's.
func Sign(req *http.Request, body []byte, key crypto.Signer, now time.Time) error {
	for _, name := range []string{SignatureInput, Signature} {
		if len(req.Header.Values(name)) > 0 {
			return fmt.Errorf("the request has a field %s already", name)
		}
	}
	if d := req.Header.Values(ContentDigest); len(d) > 0 {
		if err := CheckDigest(d, body); err != nil {
			return err
		}
	} else {
		req.Header.Set(ContentDigest, Digest(body))
	}
	_, alg, err := algorithm(key.Public())
	if err != nil {
		return err
	}
	id, err := Thumbprint(key.Public())
	if err != nil {
		return err
	}
	nonce := make([]byte, 64)
	_, _ = rand.Read(nonce) // it ends the program before it would return an error
	p := httpsfv.NewParams()
	p.Add("created", now.Unix())
	p.Add("expires", now.Add(Lifetime).Unix())
	p.Add("keyid", id)
	p.Add("alg", alg)
	p.Add("nonce", base64.StdEncoding.EncodeToString(nonce))
	p.Add("tag", Tag)
	list := httpsfv.InnerList{Params: p}
	for _, name := range components(req) {
		list.Items = append(list.Items, httpsfv.NewItem(name))
	}
	inputs := httpsfv.NewDictionary()
	inputs.Add(Label, list)
	text, err := httpsfv.Marshal(inputs)
	if err != nil {
		return err
	}
	b, err := base(req, strings.TrimPrefix(text, Label+"="))
	if err != nil {
		return err
	}
	sig, err := jws.Sign(key, b)
	if err != nil {
		return err
	}
	signatures := httpsfv.NewDictionary()
	signatures.Add(Label, httpsfv.NewItem(sig))
	value, err := httpsfv.Marshal(signatures)
	if err != nil {
		return err
	}
	req.Header.Set(SignatureInput, text)
	req.Header.Set(Signature, value)
	return nil
}

// Present says whether the request has a signature with this package's label.
func Present(req *http.Request) bool {
	values := req.Header.Values(SignatureInput)
	return len(values) > 0 && (len(strings.Join(values, "")) > maxInput || hasLabel(values))
}

func hasLabel(values []string) bool {
	d, err := httpsfv.UnmarshalDictionary(values)
	return err != nil || slices.Contains(d.Names(), Label) // what is malformed is there, and refused
}

// Verify verifies the signature of a request that arrived with a body. key
// returns the public key with an id. skew is allowed between the clocks.
func Verify(req *http.Request, body []byte, key func(id string) (crypto.PublicKey, error), now time.Time, skew time.Duration) error {
	input, err := member(req, SignatureInput)
	if err != nil {
		return err
	}
	list, ok := input.(httpsfv.InnerList)
	if !ok {
		return fmt.Errorf("%s: a list of components is expected", SignatureInput)
	}
	var names []string
	for _, item := range list.Items {
		name, ok := item.Value.(string)
		if !ok || len(item.Params.Names()) > 0 {
			return fmt.Errorf("%s: names of components without parameters are expected", SignatureInput)
		}
		names = append(names, name)
	}
	if want := components(req); !slices.Equal(names, want) {
		return fmt.Errorf("%s covers %.100q, %q are expected", SignatureInput, names, want)
	}
	p, err := readParameters(list.Params)
	if err != nil {
		return err
	}
	created, expires := time.Unix(p.created, 0), time.Unix(p.expires, 0)
	switch {
	case p.tag != Tag:
		return fmt.Errorf("the tag is %.32q, %s is expected", p.tag, Tag)
	case created.After(now.Add(skew)):
		return errors.New("the signature is from the future")
	case !now.Before(expires.Add(skew)):
		return errors.New("the signature has expired")
	case !created.Before(expires) || expires.Sub(created) > MaxLifetime:
		return fmt.Errorf("the signature lives for %s, at most %s is accepted", expires.Sub(created), MaxLifetime)
	}
	public, err := key(p.keyID)
	if err != nil {
		return err
	}
	jose, alg, err := algorithm(public)
	if err != nil {
		return err
	}
	id, err := Thumbprint(public)
	if err != nil {
		return err
	}
	if p.alg != alg || p.keyID != id {
		return fmt.Errorf("the signature is by the key %.64q with %.32q; the agent's key is %s with %s", p.keyID, p.alg, id, alg)
	}
	if err := CheckDigest(req.Header.Values(ContentDigest), body); err != nil {
		return err
	}
	text, err := httpsfv.Marshal(list)
	if err != nil {
		return err
	}
	b, err := base(req, text)
	if err != nil {
		return err
	}
	m, err := member(req, Signature)
	if err != nil {
		return err
	}
	item, ok := m.(httpsfv.Item)
	sig, isBytes := item.Value.([]byte)
	if !ok || !isBytes {
		return fmt.Errorf("%s: bytes are expected", Signature)
	}
	return jws.Verify(public, jose, b, sig)
}

// member returns this package's member of a dictionary field.
func member(req *http.Request, name string) (httpsfv.Member, error) {
	values := req.Header.Values(name)
	if len(strings.Join(values, "")) > maxInput {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxInput)
	}
	d, err := httpsfv.UnmarshalDictionary(values)
	if err != nil {
		return nil, fmt.Errorf("%s is not a dictionary: %w", name, err)
	}
	m, ok := d.Get(Label)
	if !ok {
		return nil, fmt.Errorf("%s has no member %s", name, Label)
	}
	return m, nil
}

// parameters of a signature (RFC 9421, section 2.3). All must be there, and no others.
type parameters struct {
	created, expires       int64
	keyID, alg, nonce, tag string
}

func readParameters(from *httpsfv.Params) (*parameters, error) {
	var p parameters
	for _, name := range from.Names() {
		v, _ := from.Get(name)
		var ok bool
		switch name {
		case "created":
			p.created, ok = v.(int64)
		case "expires":
			p.expires, ok = v.(int64)
		case "keyid":
			p.keyID, ok = v.(string)
		case "alg":
			p.alg, ok = v.(string)
		case "nonce":
			p.nonce, ok = v.(string)
		case "tag":
			p.tag, ok = v.(string)
		}
		if !ok {
			return nil, fmt.Errorf("%s: the parameter %.32q is unknown, or not what it must be", SignatureInput, name)
		}
	}
	if p.created == 0 || p.expires == 0 || p.keyID == "" || p.alg == "" || p.nonce == "" || p.tag == "" {
		return nil, fmt.Errorf("%s: created, expires, keyid, alg, nonce and tag are expected", SignatureInput)
	}
	return &p, nil
}
