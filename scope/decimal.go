package scope

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/holiman/uint256"
)

// A Decimal has at most this many digits before and after its point.
const (
	maxIntegerDigits  = 18
	maxFractionDigits = 17
)

// Decimal is an exact decimal number with one spelling: at most 18 digits before
// and 17 after the point, no exponent, no plus, no leading zeros, no trailing
// zeros after a point, no minus before zero. The zero value is 0. Decimals are
// comparable with == and safe for concurrent use.
type Decimal struct {
	negative bool
	scaled   uint256.Int // magnitude times 10^17
}

var (
	pow10    = powersOfTen()
	unit     = pow10[maxFractionDigits]                  // 1 as a scaled number
	tooLarge = pow10[maxIntegerDigits+maxFractionDigits] // 10^18 as a scaled number
)

func powersOfTen() (p [maxIntegerDigits + maxFractionDigits + 1]uint256.Int) {
	p[0].SetOne()
	for i := 1; i < len(p); i++ {
		p[i].Mul(&p[i-1], uint256.NewInt(10))
	}
	return p
}

// ParseDecimal reads the one spelling of a decimal.
func ParseDecimal(s string) (Decimal, error) {
	var d Decimal
	digits, negative := strings.CutPrefix(s, "-")
	integer, fraction, point := strings.Cut(digits, ".")
	switch {
	case integer == "" || strings.Trim(digits, "0123456789.") != "" || strings.Contains(fraction, "."):
		return d, fmt.Errorf("%s is not a decimal: write digits with at most one point, such as 61.24", clipped(s))
	case point && fraction == "":
		return d, fmt.Errorf("%s ends in a point: write %s", clipped(s), clipped(strings.TrimSuffix(s, ".")))
	case len(integer) > 1 && integer[0] == '0':
		return d, fmt.Errorf("%s has a leading zero: a decimal has one spelling", clipped(s))
	case len(integer) > maxIntegerDigits:
		return d, fmt.Errorf("%s has %d digits before the point, at most %d are allowed", clipped(s), len(integer), maxIntegerDigits)
	case len(fraction) > maxFractionDigits:
		return d, fmt.Errorf("%s has %d digits after the point, at most %d are allowed", clipped(s), len(fraction), maxFractionDigits)
	case point && fraction[len(fraction)-1] == '0':
		return d, fmt.Errorf("%s has a trailing zero: write %s", s, strings.TrimSuffix(strings.TrimRight(s, "0"), "."))
	}
	var hi, lo uint64
	for _, c := range integer {
		hi = hi*10 + uint64(c-'0')
	}
	for i := range maxFractionDigits {
		lo *= 10
		if i < len(fraction) {
			lo += uint64(fraction[i] - '0')
		}
	}
	d.scaled.SetUint64(hi)
	d.scaled.Mul(&d.scaled, &unit)
	d.scaled.AddUint64(&d.scaled, lo)
	if negative && d.scaled.IsZero() {
		return Decimal{}, errors.New("-0 is not a decimal: write 0")
	}
	d.negative = negative
	return d, nil
}

func clipped(s string) string {
	if len(s) > 48 {
		return fmt.Sprintf("%q...", s[:48])
	}
	return fmt.Sprintf("%q", s)
}

// String returns the one spelling of d.
func (d Decimal) String() string {
	var room [48]byte
	b := room[:0]
	if d.negative {
		b = append(b, '-')
	}
	var whole, fraction uint256.Int // a sum of decimals may be larger than one
	whole.DivMod(&d.scaled, &unit, &fraction)
	if whole.IsUint64() {
		b = strconv.AppendUint(b, whole.Uint64(), 10)
	} else {
		b = append(b, whole.Dec()...)
	}
	if f := fraction.Uint64(); f != 0 {
		var digits [maxFractionDigits]byte
		for i := len(digits) - 1; i >= 0; i-- {
			digits[i] = byte('0' + f%10)
			f /= 10
		}
		b = append(append(b, '.'), bytes.TrimRight(digits[:], "0")...)
	}
	return string(b)
}

// MarshalText returns the spelling of d, which stands in JSON as a string.
func (d Decimal) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads the one spelling of a decimal.
func (d *Decimal) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDecimal(string(b))
	return err
}

// Sign returns -1, 0 or +1.
func (d Decimal) Sign() int {
	switch {
	case d.scaled.IsZero():
		return 0
	case d.negative:
		return -1
	}
	return 1
}

// Cmp returns -1, 0 or +1 as d is less than, equal to or greater than e.
func (d Decimal) Cmp(e Decimal) int {
	switch {
	case d.negative && !e.negative:
		return -1
	case !d.negative && e.negative:
		return 1
	case d.negative:
		return e.scaled.Cmp(&d.scaled)
	}
	return d.scaled.Cmp(&e.scaled)
}

// Abs returns d without its sign.
func (d Decimal) Abs() Decimal { d.negative = false; return d }

// Add returns d + e; ok is false if the sum has more than 18 digits before the point.
func (d Decimal) Add(e Decimal) (sum Decimal, ok bool) {
	switch {
	case d.negative == e.negative:
		sum.negative = d.negative
		sum.scaled.Add(&d.scaled, &e.scaled)
	case d.scaled.Cmp(&e.scaled) >= 0:
		sum.negative = d.negative
		sum.scaled.Sub(&d.scaled, &e.scaled)
	default:
		sum.negative = e.negative
		sum.scaled.Sub(&e.scaled, &d.scaled)
	}
	if sum.scaled.IsZero() {
		sum.negative = false
	}
	return sum, sum.scaled.Lt(&tooLarge)
}

// Sub returns d - e; ok is false as for [Decimal.Add].
func (d Decimal) Sub(e Decimal) (difference Decimal, ok bool) {
	if !e.scaled.IsZero() {
		e.negative = !e.negative
	}
	return d.Add(e)
}

// product returns |a| x |b| x |c|, rounded up to the 17th digit after the
// point. Limits stand on that grid, so comparing the rounded product with one
// decides as comparing the exact one would. ok is false on overflow.
func product(a, b, c Decimal) (p Decimal, ok bool) {
	var ab, rest uint256.Int
	ab.Mul(&a.scaled, &b.scaled) // below 10^70, so below 2^256
	if c.scaled == unit {
		p.scaled.DivMod(&ab, &unit, &rest)
		if !rest.IsZero() {
			p.scaled.AddUint64(&p.scaled, 1)
		}
		return p, p.scaled.Lt(&tooLarge)
	}
	scale := &pow10[2*maxFractionDigits]
	if _, overflow := p.scaled.MulDivOverflow(&ab, &c.scaled, scale); overflow {
		return Decimal{}, false
	}
	if rest.MulMod(&ab, &c.scaled, scale); !rest.IsZero() {
		p.scaled.AddUint64(&p.scaled, 1)
	}
	return p, p.scaled.Lt(&tooLarge)
}

// withinBps says whether |price - reference| <= reference x bps / 10^4, for a
// positive reference.
func withinBps(price, reference Decimal, bps uint32) bool {
	d, ok := price.Sub(reference)
	if !ok {
		return false
	}
	var left, right uint256.Int
	left.Mul(&d.scaled, uint256.NewInt(10_000))
	right.Mul(&reference.scaled, uint256.NewInt(uint64(bps)))
	return left.Cmp(&right) <= 0
}
