package scope

import "strings"

// FIX values that actions may have and scopes may allow.
var (
	sides    = []string{"1", "2", "5", "6"}                // Side(54)
	ordTypes = []string{"1", "2", "3", "4"}                // OrdType(40)
	tifs     = []string{"0", "1", "2", "3", "4", "6", "7"} // TimeInForce(59)
)

const (
	upper        = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	upperOrDigit = upper + "0123456789"
)

func only(s, chars string) bool { return strings.Trim(s, chars) == "" }

// validText: an identifier that cannot break a log line, a FIX message or a header.
func validText(s string) bool {
	if s == "" || len(s) > maxText {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// validVenue: a MIC (ISO 10383), or lei: and an LEI.
func validVenue(s string) bool {
	if lei, ok := strings.CutPrefix(s, "lei:"); ok {
		return validLEI(lei)
	}
	return len(s) == 4 && only(s, upperOrDigit)
}

// validCurrency: the form of an ISO 4217 code, or of a DTI (ISO 24165).
func validCurrency(s string) bool {
	return len(s) == 3 && only(s, upper) || validDTI(s)
}

// validDTI: nine characters, no vowels (ISO 24165-1).
func validDTI(s string) bool {
	return len(s) == 9 && only(s, "0123456789BCDFGHJKLMNPQRSTVWXZ") && s[0] != '0'
}

// validISIN: two letters, nine letters or digits, and a check digit (ISO 6166).
func validISIN(s string) bool {
	if len(s) != 12 || !only(s[:2], upper) || !only(s[2:11], upperOrDigit) || !only(s[11:], "0123456789") {
		return false
	}
	sum, double := 0, false
	for i := len(s) - 1; i >= 0; i-- {
		v := value(s[i])
		for {
			d := v % 10
			if double {
				d = d*2/10 + d*2%10
			}
			sum += d
			double = !double
			if v /= 10; v == 0 {
				break
			}
		}
	}
	return sum%10 == 0
}

// validLEI: eighteen letters or digits and two check digits, modulo 97 (ISO 17442).
func validLEI(s string) bool {
	if len(s) != 20 || !only(s[:18], upperOrDigit) || !only(s[18:], "0123456789") {
		return false
	}
	rest := 0
	for i := range len(s) {
		if v := value(s[i]); v > 9 {
			rest = (rest*100 + v) % 97
		} else {
			rest = (rest*10 + v) % 97
		}
	}
	return rest == 1
}

// value of a letter is 10 to 35, as ISO 6166 and ISO 17442 count.
func value(c byte) int {
	if c >= 'A' {
		return int(c-'A') + 10
	}
	return int(c - '0')
}

// ValidInstrument says whether a text names an instrument as scopes do: isin:, dti: or
// symbol: and the identifier.
func ValidInstrument(s string) bool { return validInstrument(s) }

// validInstrument: how a scope names an instrument.
func validInstrument(s string) bool {
	kind, id, ok := strings.Cut(s, ":")
	switch {
	case !ok:
		return false
	case kind == "isin":
		return validISIN(id)
	case kind == "dti":
		return validDTI(id)
	case kind == "symbol":
		return validText(id)
	}
	return false
}
