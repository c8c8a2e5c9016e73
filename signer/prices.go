package signer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"inkan/internal/strictjson"
	"inkan/scope"
)

// maxPrices bounds a file of reference prices, in bytes.
const maxPrices = 4 << 20

// priceType is the typ of a JWS with reference prices.
const priceType = "reference-prices+jws"

// priceFile is a file of reference prices that is read again when it changes.
// With a key, the file is a JWS by it over the same JSON. nil has no prices.
type priceFile struct {
	path string
	key  crypto.PublicKey

	mu     sync.Mutex
	file   fileVersion
	prices map[priceName]*scope.ReferencePrice
	err    error
}

// priceName is what a reference price is known by. One without source is of
// whichever source is the last in the file, one without currency of whichever currency.
type priceName struct{ instrument, currency, source string }

func openPrices(path, keyFile string) (*priceFile, error) {
	if path == "" {
		return nil, nil
	}
	p := &priceFile{path: path}
	if keyFile != "" {
		b, err := os.ReadFile(keyFile)
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(b)
		if block == nil {
			return nil, fmt.Errorf("reference_key %s: a PUBLIC KEY in PEM is expected", keyFile)
		}
		if p.key, err = x509.ParsePKIXPublicKey(block.Bytes); err != nil {
			return nil, fmt.Errorf("reference_key %s: %w", keyFile, err)
		}
		if _, ok := p.key.(*ecdsa.PublicKey); !ok {
			return nil, fmt.Errorf("reference_key %s: an ECDSA key is expected", keyFile)
		}
	}
	return p, nil
}

// find returns the reference price for an action under a scope, or nil. If there is
// none of the scope's source in the order's currency it is another one of the instrument's, for
// the refusal to tell, or for a policy that names the source.
func (p *priceFile) find(s *scope.Scope, a *scope.Action) (*scope.ReferencePrice, error) {
	if p == nil {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v, err := versionOf(p.path)
	if err != nil {
		return nil, errors.New("the file of reference prices cannot be read")
	}
	if v != p.file {
		p.file = v
		p.prices, p.err = p.read()
	}
	if a.Order == nil {
		return nil, p.err
	}
	instrument := a.Instrument()
	for _, n := range [...]priceName{{instrument, a.Order.Currency, s.ReferenceSource()}, {instrument, a.Order.Currency, ""}, {instrument, "", ""}} {
		if found := p.prices[n]; found != nil {
			return found, p.err
		}
	}
	return nil, p.err
}

func (p *priceFile) read() (map[priceName]*scope.ReferencePrice, error) {
	b, err := os.ReadFile(p.path)
	if err != nil || len(b) > maxPrices {
		return nil, errors.New("the file of reference prices cannot be read, or is too large")
	}
	if p.key != nil {
		sig, err := jose.ParseSignedCompact(string(bytes.TrimSpace(b)), []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			return nil, errors.New("the reference prices are not a JWS with ES256")
		}
		if typ := sig.Signatures[0].Protected.ExtraHeaders[jose.HeaderType]; typ != priceType {
			return nil, fmt.Errorf("the reference prices' typ is not %s", priceType)
		}
		if b, err = sig.Verify(p.key); err != nil {
			return nil, errors.New("the reference prices are not signed by reference_key")
		}
	}
	var list []scope.ReferencePrice
	if err := strictjson.UnmarshalYAML(b, maxPrices, &list); err != nil {
		return nil, fmt.Errorf("the reference prices: %w", err)
	}
	out := make(map[priceName]*scope.ReferencePrice, 3*len(list))
	for i := range list {
		list[i].Time = list[i].Time.UTC().Truncate(time.Microsecond)
		x := &list[i]
		out[priceName{x.Instrument, x.Currency, x.Source}], out[priceName{x.Instrument, x.Currency, ""}], out[priceName{x.Instrument, "", ""}] = x, x, x
	}
	return out, nil
}
