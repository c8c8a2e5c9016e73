package httpsig

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const body = `{"id":"A-1","qty":"100"}`

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newRequest(url string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, url, strings.NewReader(body))
	r.Header.Set(AgentAction, "eyJhbGciOiJFUzI1NiJ9.e30.c2ln")
	return r
}

func always(k crypto.PublicKey) func(string) (crypto.PublicKey, error) {
	return func(string) (crypto.PublicKey, error) { return k, nil }
}

func TestSignAndVerify(t *testing.T) {
	now := time.Now()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{newKey(t), p384, ed} {
		for _, url := range []string{"https://venue.example/orders", "https://VENUE.example:443/orders?x=1", "https://venue.example:8443/", "https://venue.example/a%2Fb?"} {
			r := newRequest(url)
			if err := Sign(r, []byte(body), key, now); err != nil {
				t.Fatal(err)
			}
			if !Present(r) {
				t.Error("a signature is not present")
			}
			if err := Verify(r, []byte(body), always(key.Public()), now, time.Second); err != nil {
				t.Errorf("%T, %s: %v", key, url, err)
			}
		}
	}
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if err := Sign(newRequest("https://a/"), nil, weak, now); err == nil {
		t.Error("an RSA key signs")
	}
	for name, set := range map[string][2]string{"a signature": {Signature, "x=:AAAA:"}, "an input": {SignatureInput, "x=()"}, "another digest": {ContentDigest, Digest([]byte("other"))}, "two actions": {AgentAction, "x.y.z"}} {
		r := newRequest("https://a/")
		r.Header.Add(set[0], set[1])
		if err := Sign(r, []byte(body), newKey(t), now); err == nil {
			t.Errorf("a request with %s is signed", name)
		}
	}
}

// TestRefused: a request that was changed, or a signature outside of the profile.
func TestRefused(t *testing.T) {
	key, now := newKey(t), time.Now()
	signed := func() *http.Request {
		r := newRequest("https://venue.example/orders")
		if err := Sign(r, []byte(body), key, now); err != nil {
			t.Fatal(err)
		}
		return r
	}
	edit := func(name, from, to string) func(*http.Request) {
		return func(r *http.Request) {
			before := r.Header.Get(name)
			if after := strings.Replace(before, from, to, 1); after != before {
				r.Header.Set(name, after)
			} else {
				t.Errorf("%s has no %q: %s", name, from, before)
			}
		}
	}
	other := newKey(t)
	for name, c := range map[string]struct {
		change func(*http.Request)
		body   string
		key    crypto.PublicKey
		after  time.Duration
		want   string
	}{
		"method":                     {change: func(r *http.Request) { r.Method = http.MethodPut }, want: "does not verify"},
		"path":                       {change: func(r *http.Request) { r.URL.Path = "/cancel" }, want: "does not verify"},
		"authority":                  {change: func(r *http.Request) { r.Host = "other.example" }, want: "does not verify"},
		"a query":                    {change: func(r *http.Request) { r.URL.RawQuery = "x=1" }, want: "covers"},
		"action":                     {change: func(r *http.Request) { r.Header.Set(AgentAction, "a.b.c") }, want: "does not verify"},
		"two actions":                {change: func(r *http.Request) { r.Header.Add(AgentAction, "a.b.c") }, want: "exactly one"},
		"body":                       {body: "{}", want: "is not the body's"},
		"body and digest":            {body: "{}", change: func(r *http.Request) { r.Header.Set(ContentDigest, Digest([]byte("{}"))) }, want: "does not verify"},
		"no digest":                  {change: func(r *http.Request) { r.Header.Del(ContentDigest) }, want: "neither"},
		"another key":                {key: &other.PublicKey, want: "the agent's key"},
		"later":                      {after: Lifetime + 2*time.Second, want: "expired"},
		"earlier":                    {after: -time.Minute, want: "future"},
		"no input":                   {change: func(r *http.Request) { r.Header.Del(SignatureInput) }, want: "no member"},
		"no signature":               {change: func(r *http.Request) { r.Header.Del(Signature) }, want: "no member"},
		"another label":              {change: edit(SignatureInput, "agent=", "other="), want: "no member"},
		"fewer components":           {change: edit(SignatureInput, `"@method" `, ""), want: "covers"},
		"another order":              {change: edit(SignatureInput, `"@method" "@authority"`, `"@authority" "@method"`), want: "covers"},
		"a parameter of a component": {change: edit(SignatureInput, `"@method"`, `"@method";req`), want: "without parameters"},
		"tag":                        {change: edit(SignatureInput, `tag="web-bot-auth"`, `tag="other"`), want: "tag"},
		"no tag":                     {change: edit(SignatureInput, `;tag="web-bot-auth"`, ""), want: "are expected"},
		"another parameter":          {change: edit(SignatureInput, ";tag=", ";x=1;tag="), want: "unknown"},
		"type of a parameter":        {change: edit(SignatureInput, `tag="web-bot-auth"`, "tag=1"), want: "not what it must be"},
		"algorithm":                  {change: edit(SignatureInput, "ecdsa-p256-sha256", "hmac-sha256"), want: "the agent's key"},
		"no list":                    {change: func(r *http.Request) { r.Header.Set(SignatureInput, "agent=1") }, want: "a list"},
		"no dictionary":              {change: func(r *http.Request) { r.Header.Set(SignatureInput, "(") }, want: "dictionary"},
		"no bytes":                   {change: func(r *http.Request) { r.Header.Set(Signature, "agent=1") }, want: "bytes"},
		"a long input":               {change: func(r *http.Request) { r.Header.Add(SignatureInput, strings.Repeat("x", maxInput)) }, want: "more than"},
		"a long life": {change: func(r *http.Request) {
			in := r.Header.Get(SignatureInput)
			i := strings.Index(in, "expires=")
			r.Header.Set(SignatureInput, in[:i]+"expires=9999999999"+in[i+len("expires=")+10:])
		}, want: "lives for"},
	} {
		r := signed()
		if c.change != nil {
			c.change(r)
		}
		if c.body == "" {
			c.body = body
		}
		if c.key == nil {
			c.key = &key.PublicKey
		}
		err := Verify(r, []byte(c.body), always(c.key), now.Add(c.after), time.Second)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	unknown := errors.New("unknown")
	if err := Verify(signed(), []byte(body), func(string) (crypto.PublicKey, error) { return nil, unknown }, now, 0); !errors.Is(err, unknown) {
		t.Error(err)
	}
	// Another signature beside it does not matter.
	r := signed()
	r.Header.Add(SignatureInput, `cdn=("@method");keyid="x"`)
	r.Header.Add(Signature, "cdn=:AAAA:")
	if err := Verify(r, []byte(body), always(&key.PublicKey), now, time.Second); err != nil {
		t.Error(err)
	}
	if plain := newRequest("https://a/"); Present(plain) {
		t.Error("a request without a signature has one")
	}
}

func TestDigest(t *testing.T) {
	// RFC 9530, appendix D, and the same in other company.
	const sum = "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"
	if got := Digest([]byte(`{"hello": "world"}`)); got != sum {
		t.Errorf("%s", got)
	}
	for _, c := range []struct {
		values []string
		ok     bool
	}{
		{[]string{sum}, true}, {[]string{sum, "md5=:AAAA:"}, true}, {[]string{"md5=:AAAA:, " + sum}, true},
		{[]string{"md5=:AAAA:"}, false}, {nil, false}, {[]string{"sha-256=:AAAA:"}, false}, {[]string{sum + ", sha-512=:AAAA:"}, false},
		{[]string{"sha-256=1"}, false}, {[]string{"sha-256=(:AAAA:)"}, false}, {[]string{"=="}, false}, {[]string{strings.Repeat("a", maxDigest+1)}, false},
	} {
		if err := CheckDigest(c.values, []byte(`{"hello": "world"}`)); (err == nil) != c.ok {
			t.Errorf("%q: %v", c.values, err)
		}
	}
}

func TestThumbprint(t *testing.T) {
	// RFC 8037, appendix A.3.
	x, err := base64.RawURLEncoding.DecodeString("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Thumbprint(ed25519.PublicKey(x)); err != nil || got != "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k" {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := Thumbprint(&rsa.PublicKey{}); err == nil {
		t.Error("an RSA key has one")
	}
}

// TestOthers: what is signed here verifies with two implementations from
// elsewhere, and the other way round.
func TestOthers(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("testdata/node")); err != nil {
		t.Fatal(err)
	}
	install := exec.Command("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--cache", filepath.Join(dir, ".npm"))
	install.Dir = dir
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v: %s (make tools installs node and npm)", err, out)
	}
	key, now := newKey(t), time.Now()
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	d, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	jwk := map[string]string{"kty": "EC", "crv": "P-256", "x": encode(point[1:33]), "y": encode(point[33:]), "d": encode(d)}
	edPublic, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edJWK := map[string]string{"kty": "OKP", "crv": "Ed25519", "x": encode(edPublic)}
	type sample struct {
		url  string
		good bool
		key  crypto.Signer
		jwk  map[string]string
	}
	var in bytes.Buffer
	samples := []sample{{"https://venue.example/orders", true, key, jwk}, {"https://venue.example:8443/orders?x=1", true, key, jwk}, {"https://venue.example/orders", false, key, jwk}, {"https://venue.example/orders", true, edKey, edJWK}}
	for _, s := range samples {
		r := newRequest(s.url)
		if err := Sign(r, []byte(body), s.key, now); err != nil {
			t.Fatal(err)
		}
		if !s.good {
			r.Header.Set(AgentAction, "a.b.c")
		}
		headers := make(map[string]string)
		for name := range r.Header {
			headers[strings.ToLower(name)] = r.Header.Get(name)
		}
		if err := json.NewEncoder(&in).Encode(map[string]any{"request": map[string]any{"method": r.Method, "url": s.url, "headers": headers}, "jwk": s.jwk}); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "node", "judge.mjs")
	cmd.Dir, cmd.Stdin = dir, &in
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for _, s := range samples {
		if !lines.Scan() {
			t.Fatalf("an answer is missing: %s", out)
		}
		var said struct {
			ID            string
			First, Second any
			Signed        map[string]string
		}
		if err := json.Unmarshal(lines.Bytes(), &said); err != nil {
			t.Fatal(err)
		}
		id, err := Thumbprint(s.key.Public())
		if err != nil || said.ID != id {
			t.Errorf("the key's id is %s there and %s here, %v", said.ID, id, err)
		}
		if (said.First == true) != s.good || (said.Second == true) != s.good {
			t.Errorf("%s: %v: they say %v and %v", s.url, s.good, said.First, said.Second)
		}
		if s.key != key || !s.good {
			continue
		}
		r := newRequest(s.url)
		for name, value := range said.Signed {
			r.Header.Set(name, value)
		}
		if err := Verify(r, []byte(body), always(&key.PublicKey), time.Now(), 2*time.Second); err != nil {
			t.Errorf("what the other one signed: %v: %v", err, said.Signed)
		}
	}
}

// FuzzVerify: nothing but the signature that was made verifies.
func FuzzVerify(f *testing.F) {
	key, now := newKey(f), time.Unix(1_785_144_610, 0)
	good := newRequest("https://venue.example/orders")
	if err := Sign(good, []byte(body), key, now); err != nil {
		f.Fatal(err)
	}
	f.Add(good.Header.Get(SignatureInput), good.Header.Get(Signature), good.Header.Get(ContentDigest))
	f.Add(`agent=("@method");created=1`, "agent=:AAAA:", "sha-256=:AAAA:")
	f.Fuzz(func(t *testing.T, input, signature, digest string) {
		r := newRequest("https://venue.example/orders")
		r.Header.Set(SignatureInput, input)
		r.Header.Set(Signature, signature)
		r.Header.Set(ContentDigest, digest)
		Present(r)
		if Verify(r, []byte(body), always(&key.PublicKey), now, time.Second) == nil && !strings.Contains(digest, strings.TrimPrefix(good.Header.Get(ContentDigest), "sha-256=")) {
			t.Errorf("%q, %q, %q verifies", input, signature, digest)
		}
	})
}
