// close_match.h - the known name that a misspelled one is closest to, by the rule of Python's difflib. Private.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flatmtl {
namespace detail {

// How many characters match: those of the longest common block, the first of equal ones, and of what is left and right
// of it.
inline size_t matching(std::string_view a, std::string_view b) {
  size_t best = 0, at_a = 0, at_b = 0;
  for (size_t i = 0; i < a.size(); ++i)
    for (size_t j = 0; j < b.size(); ++j) {
      size_t length = 0;
      while (i + length < a.size() && j + length < b.size() && a[i + length] == b[j + length]) ++length;
      if (length <= best) continue;
      best = length;
      at_a = i;
      at_b = j;
    }
  if (best == 0) return 0;
  return best + matching(a.substr(0, at_a), b.substr(0, at_b)) + matching(a.substr(at_a + best), b.substr(at_b + best));
}

// difflib.get_close_matches(name.lower(), known, n=1): the one that shares the most with it, 60 % at least, and of
// equal ones the last in the alphabet.
inline std::optional<std::string> close_match(std::string name, const std::vector<std::string> &known) {
  for (char &letter : name)
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  std::optional<std::string> best;
  double best_ratio = 0.6;
  for (const std::string &candidate : known) {
    const double both = static_cast<double>(candidate.size() + name.size());
    const double ratio = 2.0 * static_cast<double>(matching(candidate, name)) / both;
    if (ratio < best_ratio || (best && ratio == best_ratio && candidate < *best)) continue;
    best = candidate;
    best_ratio = ratio;
  }
  return best;
}

}  // namespace detail
}  // namespace flatmtl
